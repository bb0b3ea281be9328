"""Collectives parsed from HLO text: their bytes in every notation, and whether a loop repeats them."""

import pytest

from benchmarks.xla.collectives import collectives

# As XLA writes them on a CPU and (the starts) on a GPU.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%deep (p: f32[8,4]) -> bf16[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %half = bf16[8,4]{1,0} convert(%p)
  ROOT %moved = bf16[8,4]{1,0} collective-permute(%half), channel_id=7, source_target_pairs={{0,1},{1,0}}
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %all = f32[16,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %y = f32[8,4]{1,0} slice(%all), slice={[0:8], [0:4]}
  %same = bf16[8,4]{1,0} call(%y), to_apply=%deep
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(false)
}

ENTRY %main (x.1: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,4]{1,0}) tuple(%zero, %x.1)
  %end = (s32[], f32[8,4]{1,0}) while(%begin), condition=%condition, body=%body
  %z = f32[8,4]{1,0} get-tuple-element(%end), index=1
  %part = f32[4,4]{1,0} reduce-scatter(%z), channel_id=2, replica_groups={{0,1}}, dimensions={0}, to_apply=%add
  %both = (f32[4,4]{1,0}, /*index=1*/s32[]) all-reduce(%part, /*index=1*/%zero), channel_id=3, to_apply=%add
  %given = f32[4,4]{1,0} get-tuple-element(%both), index=0
  %begun = (f32[4,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%given), channel_id=4, dimensions={0}
  %whole = f32[8,4]{1,0} all-gather-done(%begun)
  %summing = f32[8,4]{1,0} all-reduce-start(%whole), channel_id=5, to_apply=%add
  ROOT %out = f32[8,4]{1,0} all-reduce-done(%summing)
}
"""


def test_bytes_are_of_whole_arrays_and_what_a_loop_calls_is_in_the_loop():
    assert collectives(PROGRAM) == [
        ("collective-permute", 64, True),
        ("all-gather", 256, True),
        ("reduce-scatter", 128, False),
        ("all-reduce", 68, False),
        ("all-gather", 128, False),
        ("all-reduce", 128, False),
    ]


def test_text_that_is_no_whole_program_is_refused():
    with pytest.raises(ValueError, match="main: operand z of part is not defined"):
        collectives(PROGRAM.replace("%z = ", "%other = "))
