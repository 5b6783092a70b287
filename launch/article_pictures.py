"""Makes the folders of captioned pictures of the article's re-enactment.

.venv/bin/python launch/article_pictures.py --out=DIR [--count=2048] [--seed=0]     that its base model is pretrained on
.venv/bin/python launch/article_pictures.py --out=DIR --fine_tuning [--seed=1]      the 40 that it is fine-tuned on
"""

import argparse

from offsetjax.article.pictures import write_fine_tuning_folder, write_folder

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--count", type=int, default=2048)
    which.add_argument("--fine_tuning", action="store_true")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.fine_tuning:
        write_fine_tuning_folder(options.out, 1 if options.seed is None else options.seed)
    else:
        write_folder(options.out, options.count, options.seed or 0)
