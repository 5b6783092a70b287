"""Makes the folder of captioned pictures that the base model of the article's re-enactment is pretrained on.

python launch/article_pictures.py --out=DIR [--count=2048] [--seed=0]
"""

import argparse

from offsetjax.article.pictures import write_folder

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_folder(options.out, options.count, options.seed)
