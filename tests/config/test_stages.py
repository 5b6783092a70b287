"""Stages of a training: what they set, when they begin, what is refused, and what a resume may change of them."""

from typing import Any

import pytest

from offsetjax.config import assign, config_at, config_of_stage, default_config, flatten, from_json, stages_of, to_json
from offsetjax.config.checks import validate
from offsetjax.config.load import override
from offsetjax.config.stages import check_past, stage_at
from offsetjax.errors import UserError

THREE = (
    "train.steps=100 data.resolution=256 train.global_batch_size=64 optimizer.learning_rate=1e-4",
    "train.steps=40 data.resolution=512  data.buckets=('512x512', '640x384') optimizer.decay=constant",
    "train.steps=20 data.resolution=1024 data.bucket_count=7 data.path=/my pictures/large",
)


def _config(*stages: str, steps: int = 0, **changes: Any) -> Any:
    config = default_config()
    config.train.stages = stages
    config.train.steps = steps or 160
    for path, value in changes.items():
        assign(config, path.replace("__", "."), value)
    return config


def test_each_stage_has_its_steps_and_its_settings_and_is_a_training_without_stages() -> None:
    config = _config(*THREE, data__path="pictures")
    validate(config)
    stages = stages_of(from_json(to_json(config)))
    assert [stage.steps for stage in stages] == [range(100), range(100, 140), range(140, 160)]
    assert [stage_at(stages, step).number for step in (0, 1, 100, 101, 140, 141, 160, 999)] == [1, 1, 1, 2, 2, 3, 3, 3]
    first, second, third = (stage.config(config) for stage in stages)
    assert [each.data.resolution for each in (first, second, third)] == [256, 512, 1024]
    assert [each.train.global_batch_size for each in (first, second, third)] == [64, 8, 8]
    assert [each.data.path for each in (first, second, third)] == ["pictures", "pictures", "/my pictures/large"]
    assert second.data.buckets == ("512x512", "640x384") and second.optimizer.decay == "constant"
    assert first.optimizer.learning_rate == 1e-4 and third.data.bucket_count == 7
    for each in (first, second, third):
        validate(each)
        assert each.train.stages == () and each.train.steps == 160  # by which noise.anneal goes
    assert config_at(config, 141).data.resolution == 1024 and config.data.resolution == 512


def test_a_config_without_stages_is_one_stage_and_stays_the_same_object() -> None:
    config = default_config()
    [stage] = stages_of(config)
    assert stage.steps == range(1000) and stage.config(config) is config is config_at(config, 7)


def test_the_command_line_sets_stages() -> None:
    config = default_config()
    override(config, "train.stages", str(THREE))
    assert config.train.stages == THREE
    override(config, "train.stages", THREE[0])
    assert config.train.stages == THREE[:1]


@pytest.mark.parametrize(
    ("stages", "changes", "words"),
    [
        (THREE, {"steps": 200}, "train.steps = 200, but the stages of train.stages have 160 steps together"),
        (("train.steps=160", ""), {}, "train.stages, stage 2: '' sets no field"),
        (("data.resolution=256",), {}, "stage 1: it has no train.steps"),
        (("train.steps=160 train.steps=160",), {}, "stage 1: train.steps is given twice"),
        (("train.steps=0",), {}, "stage 1: train.steps = 0 must be at least 1"),
        (("train.steps=160 data.resolution=small",), {}, "stage 1: data.resolution = 'small' is not of type int"),
        (("train.steps=160 data.resolution=4",), {}, "stage 1: data.resolution = 4 must be at least 8"),
        (("train.steps=160 data.reslution=256",), {}, "stage 1: unknown key 'data.reslution'; did you mean"),
        (("train.steps=160 noise.kind=pyramid",), {}, "stage 1: noise.kind cannot change between stages; train.steps,"),
        (("train.steps=160 train.stages=x",), {}, "stage 1: train.stages cannot change between stages"),
        (("train.steps=100", "train.steps=60 data.bucket_step=32"), {}, "stage 2: data.bucket_step cannot apply with"),
        (("train.steps=100 train.accumulate_steps=3", "train.steps=60"), {}, "stage 1: train.global_batch_size = 8"),
        (
            ("train.steps=100", "train.steps=60 data.resolution=256"),
            {"noise__calibration": "file.json"},
            "noise.calibration is of one data.resolution, but with train.stages there are 256, 512; set noise.ref",
        ),
        (
            ("train.steps=100", "train.steps=60 optimizer.text_encoder_learning_rate=1e-5"),
            {"train__text_encoders": True},
            "optimizer.text_encoder_learning_rate must be above 0 in all stages, or in none",
        ),
    ],
)
def test_what_makes_no_training_is_refused_in_one_line(
    stages: tuple[str, ...], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate(_config(*stages, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("config: ")


def test_a_setting_that_only_stages_need_applies() -> None:
    validate(_config("train.steps=160 data.bucket_count=5", data__bucket_step=32))
    with pytest.raises(UserError, match=r"stage 2: data\.bucket_step cannot apply"):
        validate(_config("train.steps=100 data.bucket_count=5", "train.steps=60", data__bucket_step=32))


@pytest.mark.parametrize(
    ("before", "after", "step", "words"),
    [
        (THREE, (THREE[0], "train.steps=60 data.resolution=640"), 100, ""),  # at the seam, what is to come
        (THREE, (THREE[0], "train.steps=60 data.resolution=640"), 101, "stage 2 has begun, with data.resolution = 512"),
        (THREE, (*THREE[:2], "train.steps=999"), 130, ""),
        (THREE, (THREE[0].replace("100", "60"), *THREE[1:]), 50, ""),  # the end of the present one
        (THREE, (THREE[0].replace("100", "60"), *THREE[1:]), 61, "stage 1 has begun, with steps 1 to 100"),
        (THREE, (THREE[0].replace("1e-4", "2e-4"), *THREE[1:]), 150, "stage 1 has begun, with optimizer.learning_rate"),
        (THREE, (THREE[0].replace("1e-4", "2e-4"), *THREE[1:]), 0, ""),
        (THREE, (), 150, "stage 1 has begun"),
        (("train.steps=160",), ("train.steps=160", "train.steps=5 data.resolution=1024"), 160, ""),
        ((), ("train.steps=160", "train.steps=5 data.resolution=1024"), 160, ""),  # stages for a run that had none
        (
            (),
            ("train.steps=160 data.resolution=256", "train.steps=5"),
            160,
            "has begun, with data.resolution = 512",
        ),
        (THREE, (*THREE[:2], THREE[2].replace("/large", "/moved")), 150, ""),
    ],
)
def test_a_resume_may_change_what_has_not_begun(
    before: tuple[str, ...], after: tuple[str, ...], step: int, words: str
) -> None:
    def values(stages: tuple[str, ...]) -> dict[str, Any]:
        lengths = [int(stage.split()[0].removeprefix("train.steps=")) for stage in stages]
        return dict(flatten(_config(*stages, steps=sum(lengths))))

    if not words:
        check_past(values(before), values(after), step)
        return
    with pytest.raises(UserError) as caught:
        check_past(values(before), values(after), step)
    assert words in str(caught.value)


def test_what_is_prepared_for_a_stage_says_for_which() -> None:
    config = _config(*THREE)
    assert config_of_stage(config, 3).data.resolution == 1024
    with pytest.raises(UserError, match=r"train\.stages has 3 stages; say for which, such as --stage=1"):
        config_of_stage(config, None)
    with pytest.raises(UserError, match=r"there is no stage 4: train\.stages has 3"):
        config_of_stage(config, 4)
    assert config_of_stage(default_config(), None).data.resolution == 512
