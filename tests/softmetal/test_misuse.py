"""Each planted fault of misuse/misuse.mm ends its process with a message that names it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from . import python_environment
from .misuse.driver import Outcome

ABORTS = {
    "set_bytes_too_long": "setBytes at index 2: length 4100 must be in 1..4096",
    "set_bytes_empty": "setBytes at index 2: length 0 must be in 1..4096",
    "set_bytes_null": "setBytes at index 2: NULL",
    "set_bytes_wrong_size": "argument params at index 2: setBytes gave 4 bytes, its type has 8",
    "set_bytes_written_to": "argument y at index 1 is written to, but setBytes bound it",
    "set_buffer_data_ptr": "is not a living MTLBuffer",
    "set_buffer_freed": "is not a living MTLBuffer",
    "set_buffer_index": "index 31 must be in 0..30",
    "offset_past_end": "offset 1048576 is past the buffer's 32 bytes",
    "offset_misaligned": "argument x at index 0: offset 2 is not a multiple of 4",
    "constant_offset_misaligned": "argument params at index 2: offset 6 is not a multiple of 4",
    "buffer_shorter_than_struct": "4 bytes follow offset 28, its type has 8",
    "missing_binding": "missing buffer binding at index 1 for argument y",
    "missing_threadgroup_memory": "threadgroup memory at index 0 for argument memory was not set",
    "threadgroup_memory_not_16": "100 is not a multiple of 16",
    "threadgroup_memory_too_large": "40960 bytes of threadgroup memory, the device has 32768",
    "no_pipeline": "dispatch without a pipeline state",
    "nil_pipeline": "setComputePipelineState: nil",
    "too_many_threads": "2048 threads per threadgroup, its pipeline admits 1024",
    "empty_grid": "grid (0, 1, 1): each must be in 1..2^32-1",
    "empty_threadgroup": "threadsPerThreadgroup (0, 1, 1): each must be in 1..2^32-1",
    "second_encoder": "another encoder is open on this command buffer",
    "encoder_not_ended": "endEncoding",
    "use_after_end": "setComputePipelineState after endEncoding",
    "end_twice": "endEncoding after endEncoding",
    "commit_with_open_encoder": "commit while an encoder is open",
    "commit_of_torchs_buffer": "use torch::mps::commit()",
    "commit_twice": "commit of a committed command buffer",
    "encoder_after_commit": "computeCommandEncoder on a committed command buffer",
    "wait_before_commit": "waitUntilCompleted before commit",
    "kept_command_buffer": "computeCommandEncoder on a committed command buffer",
    "encoder_beside_torchs_own": "computeCommandEncoder",
    "command_buffer_off_queue": "get_command_buffer() outside of dispatch_sync",
    "encoder_off_queue": "computeCommandEncoder outside of dispatch_sync",
    "encode_off_queue": "setComputePipelineState outside of dispatch_sync",
    "nested_dispatch_sync": "whose block this thread is already in: deadlock",
    "exception_in_block": "a C++ exception left a dispatched block: thrown inside",
    "tensor_in_block": "newBufferWithLength inside a dispatched block",
    "library_in_block": "newLibraryWithSource inside a dispatched block",
    "pipeline_in_block": "newComputePipelineStateWithFunction inside a dispatched block",
    "synchronize_in_block": "the host waits for the device inside a dispatched block",
    "copy_in_block": "inside a dispatched block",
    "message_to_deallocated": "message languageVersion sent to a deallocated MTLCompileOptions",
    "unknown_selector": "-[SoftDevice noSuchMethod]: unrecognized selector",
    "written_beside_buffer": "somebody wrote beside an MTLBuffer of 60 bytes",
    "without_pool": "a MTLCompileOptions was autoreleased with no pool in place",
}
RAISES = {
    "grid_too_large": "kernel scale: ",
    "far_write": "kernel far_write: ",
    "data_race": "RACE",
}


REPORTED = [
    # library or source, minor language version, function, constant, type: message
    (("misuse", 1, "", "", ""), ""),
    (("misuse", 1, "scale", "", ""), ""),
    (("kernel void f( {", 1, "", "", ""), "program_source:1"),
    (("kernel void f(device float* y [[buffer(0)]]) { y[0] = z; }", 1, "", "", ""), "'z'"),
    (("kernel void f(device bfloat* y [[buffer(0)]]) {}", 0, "", "", ""), "'bfloat'"),
    (("misuse", 1, "no_such_function", "", ""), "no function named no_such_function"),
    (("specialized", 1, "specialized", "", ""), "factor"),
    (("specialized", 1, "specialized", "facktor", "float"), "no function constant facktor"),
    (("specialized", 1, "specialized", "factor", "bool"), "factor is a float, got a bool"),
    (("specialized", 1, "specialized", "factor", "float"), "negate"),
]


@pytest.fixture(scope="module")
def outcomes(soft: None) -> dict[str, Outcome]:
    command = [sys.executable, "-m", f"{__package__}.misuse.driver"]
    environment = python_environment(KVQ_SOFTMETAL_MODE="race")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_fault_is_listed(outcomes: dict[str, Outcome]) -> None:
    assert set(outcomes) == {"none", *ABORTS, *RAISES}


def test_control_passes(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["none"] == {"signal": 0, "status": 0, "output": ""}


@pytest.mark.parametrize("fault", ABORTS)
def test_misuse_aborts(fault: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[fault]
    assert outcome["signal"] == signal.SIGABRT, outcome
    assert "[softmetal] failed assertion: " in outcome["output"]
    assert ABORTS[fault] in outcome["output"]


@pytest.mark.parametrize("fault", RAISES)
def test_kernel_fault_raises_at_synchronisation(fault: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[fault]
    assert (outcome["signal"], outcome["status"]) == (0, 1), outcome
    assert RAISES[fault] in outcome["output"]


@pytest.mark.parametrize(("request_", "message"), REPORTED)
def test_what_metal_reports_comes_as_nserror(
    misuse: ModuleType, request_: tuple, message: str
) -> None:
    found = misuse.error_of(*request_)
    assert message in found
    assert bool(found) == bool(message)
