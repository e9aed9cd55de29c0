"""What a program sends, read from texts written by hand and from one that this machine compiles."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm import packing, plan_hlo

# A loop of four turns by twos, inside one of three; a gather that starts in the outer one and whose
# end stands in the inner one; a payload that is no instruction.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%a.1, %b.1)
}

%overlap (p.9: bf16[4,8]) -> bf16[32,8] {
  %p.9 = bf16[4,8]{1,0} parameter(0)
  ROOT %again = bf16[32,8]{1,0} all-gather(%p.9), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%inner_body (p.1: (bf16[2,3], u32[])) -> (bf16[2,3], u32[]) {
  %p.1 = (bf16[2,3]{1,0}, u32[]) parameter(0)
  %two = u32[] constant(2)
  %x.1 = bf16[2,3]{1,0} get-tuple-element(%p.1), index=0
  %i.1 = u32[] get-tuple-element(%p.1), index=1
  %start = (bf16[2,3]{1,0}, bf16[2,3]{1,0}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=5, source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/q/dot"}
  %done = bf16[2,3]{1,0} collective-permute-done(%start)
  %fused = bf16[32,8]{1,0} fusion(%x.1), kind=kCustom, calls=%overlap
  %next.1 = u32[] add(%i.1, %two)
  ROOT %t.1 = (bf16[2,3]{1,0}, u32[]) tuple(%done, %next.1)
}

%inner_cond (p.2: (bf16[2,3], u32[])) -> pred[] {
  %p.2 = (bf16[2,3]{1,0}, u32[]) parameter(0)
  %eight = u32[] constant(8)
  %i.2 = u32[] get-tuple-element(%p.2), index=1
  ROOT %c.2 = pred[] compare(%i.2, %eight), direction=LT
}

%outer_body (p.3: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %p.3 = (s32[], bf16[2,3]{1,0}) parameter(0)
  %one = s32[] constant(1)
  %zero = u32[] constant(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %x.3 = bf16[2,3]{1,0} get-tuple-element(%p.3), index=1
  %shard = bf16[4,8]{1,0} custom-call(%x.3), custom_call_target="k", backend_config={"a": "
}
  not = an instruction"}
  %gather = bf16[32,8]{1,0} all-gather(%shard), channel_id=7, replica_groups=mesh['a'=8] {'a'}, dimensions={0}
  %init = (bf16[2,3]{1,0}, u32[]) tuple(%x.3, %zero)
  %loop = (bf16[2,3]{1,0}, u32[]) while(%init), condition=%inner_cond, body=%inner_body
  %y.3 = bf16[2,3]{1,0} get-tuple-element(%loop), index=0
  %next.3 = s32[] add(%one, %i.3)
  ROOT %t.3 = (s32[], bf16[2,3]{1,0}) tuple(%next.3, %y.3)
}

%outer_cond (p.4: (s32[], bf16[2,3])) -> pred[] {
  %p.4 = (s32[], bf16[2,3]{1,0}) parameter(0)
  %three = s32[] constant(3)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  ROOT %c.4 = pred[] compare(%i.4, %three), direction=LT
}

ENTRY %main (p.5: bf16[2,3]) -> f32[40] {
  %p.5 = bf16[2,3]{1,0} parameter(0)
  %nought = s32[] constant(0)
  %begin = (s32[], bf16[2,3]{1,0}) tuple(%nought, %p.5)
  %layers = (s32[], bf16[2,3]{1,0}) while(%begin), condition=%outer_cond, body=%outer_body
  %g = f32[40]{0} custom-call(%layers), custom_call_target="k"
  ROOT %r = f32[40]{0} all-reduce(%g), channel_id=9, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add
}
"""  # noqa: E501


def test_loops_groups_and_channels_are_followed():
    found = {c.kind: c for c in plan_hlo.collectives(TEXT)}
    assert sorted(found) == ['all-gather', 'all-reduce', 'collective-permute']
    permute, gather, reduce = (found[k] for k in ('collective-permute', 'all-gather', 'all-reduce'))
    assert (permute.times, permute.sent) == (3 * 4, 3 * 4 * 2 * 3 * 2)
    assert permute.of == 'jit(step)/q/dot'
    assert (gather.times, gather.sent) == (3, 3 * 32 * 8 * 2 * 7 / 8)
    assert (reduce.times, reduce.sent) == (1, 2 * 40 * 4 * 3 / 4)


def test_summary_tells_the_stream_by_its_lengths():
    shape = packing.Shape(tokens=16, rows=((1, 40),), prompts=1, candidates=1)
    said = plan_hlo.summary(TEXT, shape)
    assert said['sent_embedding'] == 0
    assert said['sent_stream'] == said['sent']['all-gather'] + said['sent']['all-reduce']
    assert said['sums'] == said['sent']['all-reduce'] == 240
    assert said['largest_sum'] == 40
    other = plan_hlo.summary(TEXT, shape._replace(tokens=17, rows=((1, 41),)))
    assert other['sent_stream'] == 0
    named = '{"fsdp"}'.replace('"', "'") + ', metadata={op_name="jit(step)/embed/take"}'
    embed = plan_hlo.summary(TEXT.replace("{'fsdp'}", named), shape)
    assert embed['sent_embedding'] == said['sent']['all-reduce']
    assert embed['sent_stream'] == said['sent']['all-gather']


@pytest.mark.parametrize(
    ('text', 'size'),
    [
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp','tensor'}, x", 8),
        ("replica_groups=mesh['a'=16] {'a':(4)4}, x", 4),
        ('replica_groups=[2,8]<=[16], x', 8),
        ('replica_groups={{0,2,4},{1,3,5}}, x', 3),
    ],
)
def test_groups_in_all_their_spellings(text, size):
    assert plan_hlo._group(text) == size


def test_what_is_not_understood_is_not_guessed():
    with pytest.raises(ValueError, match='replica_groups'):
        plan_hlo.collectives(TEXT.replace("mesh['data'=2,'fsdp'=4] {'fsdp'}", 'all'))
    with pytest.raises(ValueError, match='counter'):
        plan_hlo.collectives(TEXT.replace('direction=LT', 'direction=NE'))


def test_a_program_compiled_here_gathers_its_weights_once_a_layer():
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    D, L = 64, 5

    def fn(x, w):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, put())
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), put('fsdp')), None

        return jax.lax.scan(layer, x, w)[0]

    x = jax.ShapeDtypeStruct((16, D), jnp.float32, sharding=put('fsdp'))
    w = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=put(None, 'fsdp'))
    text = jax.jit(fn).lower(x, w).compile().as_text()
    assert re.search('while', text)
    sent = sum(c.sent for c in plan_hlo.collectives(text))
    assert sent == L * D * D * 4 * 7 / 8
