"""The reader of HLO text: shapes, groups of devices in each of their forms, texts that are cut off."""

import jax
import jax.numpy as jnp
import pytest

from offsetjax.plan import hlo


@pytest.mark.parametrize(
    ("text", "num_bytes", "space"),
    [
        ("f32[16,8,16]{2,1,0}", 16 * 8 * 16 * 4, 0),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 8 * 128 * 2, 0),  # padded to a tile
        ("bf16[3,300]{0,1:T(8,128)(2,1)S(1)}", 304 * 128 * 2, 1),  # the first dimension is the fastest
        ("f32[600,1]{0,1:T(1,128)S(1)}", 640 * 4, 1),
        ("pred[]{:T(512)}", 1, 0),
        ("s32[2]{0:S(4)}", 8, 4),
        ("f8e4m3fn[10]", 10, 0),
        ("s4[10]", 5, 0),
        ("token[]", 0, 0),
    ],
)
def test_what_an_array_takes_in_memory(text: str, num_bytes: int, space: int) -> None:
    (shape,) = hlo.parse_shapes(text)
    assert (shape.num_bytes, shape.space) == (num_bytes, space)


def test_a_tuple_is_its_arrays() -> None:
    shapes = hlo.parse_shapes("(f32[3]{0:T(128)S(1)}, (bf16[2,2]{1,0}, u32[]{:S(2)}), /*index=3*/pred[7]{0})")
    assert [(shape.dtype, shape.dimensions) for shape in shapes] == [
        ("f32", (3,)),
        ("bf16", (2, 2)),
        ("u32", ()),
        ("pred", (7,)),
    ]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,8},{1,9},{2,10}}", (0, 8)),
        ("replica_groups=[2,8]<=[16]", tuple(range(8))),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", (0, 8)),
        ("replica_groups=[4,4]<=[4,2,2]T(1,2,0)", (0, 4, 8, 12)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}", (0, 1, 8, 9)),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(1)2}", (0, 4)),  # the major part of an axis
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,0},{4,1},{8,2}}", (4, 1)),
        ("source_target_pairs={{0,0},{1,1}}", ()),
        ("dimensions={1}", ()),
    ],
)
def test_the_first_group_in_each_form(text: str, group: tuple[int, ...]) -> None:
    assert hlo.first_group(f"channel_id=1, {text}, use_global_device_ids=true") == group


def test_a_compiled_program_is_read() -> None:
    text = jax.jit(lambda x: jnp.sin(x @ x).sum()).lower(jnp.ones((64, 64))).compile().as_text()
    module = hlo.parse(text)
    assert module.entry.parameters[0].shapes[0].dimensions == (64, 64)
    assert module.entry.root.shapes[0].dimensions == ()
    for computation in module.computations.values():
        for each in computation.instructions:
            assert all(operand in computation.by_name for operand in each.operands), each.name


def test_a_text_that_is_cut_off_is_not_taken_for_whole() -> None:
    text = jax.jit(lambda x: jnp.sin(x @ x).sum()).lower(jnp.ones((64, 64))).compile().as_text()
    end = text.rstrip().rindex("}")
    for cut in (0, text.index("ENTRY"), (text.index("ENTRY") + end) // 2, end):
        with pytest.raises(ValueError, match="not whole"):
            hlo.parse(text[:cut])
