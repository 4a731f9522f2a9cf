"""The C++ loop: threads, chunks, dtypes that it does not support, and machines on which it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lion_cases import HAS_COMPILER, MASTERS, MOMENTA, after_steps_on_views, same_bits, same_state

from megatron_lion.optim import cpp, cpp_compiler, implementations
from megatron_lion.optim.lion import Lion
from megatron_lion.optim.update import Slot

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
SOURCE = Path(cpp_compiler.__file__).with_name("lion.cpp")
CHUNK = 1 << 16


@pytest.fixture
def no_memory_of_builds():
    """Clears what the process has cached about compilers, before and after the test."""
    cpp.library.forget()
    yield
    cpp.library.forget()


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("mode", [("split32", "fp32"), ("split24", "int8"), ("none", "bf16")])
def test_threads_chunks_and_odd_offsets_leave_no_seam(first, mode, monkeypatch):
    """Shards begin at any offset; lengths are close to a block, a chunk and several threads' chunks; one is empty."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    lengths = (3 * CHUNK + 1, 0, 511, 512, 513, 1, 31, 33, CHUNK)
    options = {"cautious": True, "master_weights": mode[0], "momentum": mode[1]}
    expected, found = (after_steps_on_views(name, lengths, first, "cpu", **options) for name in ("reference", "cpp"))
    assert same_state(expected, found)


@pytest.mark.parametrize("master_weights", MASTERS)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_of_a_step_in_every_mode(master_weights, momentum, dtype):
    """bfloat16 gradients, a multiplier, m_0 = g_1 and a step that is skipped, together."""
    ends = []
    for implementation in ("reference", "cpp"):
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in (700, 45)]
        settings = {"master_weights": master_weights, "momentum": momentum, "init_exp_avg": "first_gradient"}
        optimizer = Lion(params, lr=torch.tensor(0.01), implementation=implementation, count_steps=True, **settings)
        for number in range(4):
            for param in params:
                param.decoupled_grad = torch.randn(param.shape, generator=generator).to(torch.bfloat16)
            found = torch.tensor(float(number == 1))
            optimizer.step(grad_multiplier=torch.tensor([0.37, 0.9]), found_inf=found)
        assert optimizer.state[params[0]]["step"].item() == 3
        ends.append(optimizer)
    assert same_state(*ends)


@pytest.mark.parametrize("cautious", [False, True])
def test_dtypes_that_it_leaves_to_torch_are_updated_beside_the_others(cautious):
    ends = []
    for implementation in ("reference", "cpp"):
        generator = torch.Generator().manual_seed(3)
        dtypes = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
        params = [torch.nn.Parameter(torch.randn(90, generator=generator).to(dtype)) for dtype in dtypes]
        optimizer = Lion(params, lr=0.01, weight_decay=0.1, implementation=implementation, cautious=cautious)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(90, generator=generator).to(param.dtype)
            optimizer.step()
        ends.append(optimizer)
    assert same_state(*ends)


def step_of_sizes(*sizes, **options):
    """Takes one step of ones on parameters of ones."""
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = Lion(params, **options)
    optimizer.step()
    return optimizer


def test_auto_takes_it_where_it_pays(tmp_path, monkeypatch, no_memory_of_builds):
    taken = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp, "cpp_step", lambda slots, *_: taken.append(len(slots)))
    monkeypatch.setattr(implementations, "CPP_PAYS", 100)
    for sizes in ((99,), (60, 40)):
        step_of_sizes(*sizes)
    assert taken == [2]


def test_auto_compiles_nothing_for_a_small_model(tmp_path, monkeypatch, no_memory_of_builds):
    calls = tmp_path / "calls"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f'echo "$*" >> {calls}; exec c++ "$@"'))
    for _ in range(3):
        step_of_sizes(50)
    assert calls.read_text() == "--version\n", "asked once a process, and not to compile"
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp.library.forget()
    step_of_sizes(50)


def test_auto_asks_for_no_compiler_without_parameters_or_on_another_device(monkeypatch, no_memory_of_builds):
    monkeypatch.setattr(cpp_compiler, "is_kept", lambda name: pytest.fail("asked"))
    assert implementations.choose_implementation("auto", []) == "foreach"
    meta = Slot(torch.ones(3, device="meta"), torch.ones(3, device="meta"), {}, {})
    assert implementations.choose_implementation("auto", [meta]) == "foreach"


@pytest.mark.parametrize("mode", [("split32", "fp32"), ("none", "int8")])
def test_auto_takes_a_library_that_is_there(mode, tmp_path, monkeypatch, no_memory_of_builds):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"master_weights": mode[0], "momentum": mode[1]}
    expected = step_of_sizes(50, 7, **options)
    cpp.library.load()  # as a larger model in an earlier process builds it
    taken, real = [], cpp.cpp_step
    monkeypatch.setattr(cpp, "cpp_step", lambda slots, *rest: taken.append(len(slots)) or real(slots, *rest))
    assert same_state(step_of_sizes(50, 7, **options), expected)
    assert taken == [], "a process keeps to what it found first"
    cpp.library.forget()
    monkeypatch.setattr(cpp_compiler, "_compile", lambda *_: pytest.fail("compiled"))
    assert same_state(step_of_sizes(50, 7, **options), expected)
    assert taken == [2]


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "no C++ compiler (no-such-compiler) on the path; install one or set CXX"),
        ("echo it is broken >&2; exit 1", "failed: it is broken"),
        ("exit 0", "failed: exit code 0"),
        ('exec c++ "$@" -Ofast', "computes other bits than the reference"),
        (
            'for output; do :; done; test "$output" = --version || echo "rubbish" > "$output"',
            "cannot be built or loaded",
        ),
    ],
    ids=["missing", "failing", "silent", "fast and loose", "rubbish"],
)
def test_a_compiler_that_will_not_do(compiler, message, tmp_path, monkeypatch, caplog, no_memory_of_builds):
    """ "auto" uses foreach and logs one line; "cpp" raises an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler if " " not in compiler else script(tmp_path / "cxx", compiler))
    monkeypatch.setattr(implementations, "CPP_PAYS", 1)
    ends = []
    for implementation in ("reference", "auto"):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = Lion([param], implementation=implementation)
        for _ in range(3):
            param.grad = torch.linspace(1, -2, 50)
            optimizer.step()
        ends.append(optimizer)
    assert same_state(*ends)
    lines = [record.getMessage() for record in caplog.records if record.name == cpp.__name__]
    assert len(lines) == 1
    assert "slower foreach path" in lines[0]
    assert message in lines[0]
    assert sys.float_info.min / 2 > 0, "a library linked with -Ofast must not flush subnormals in the whole process"
    param.grad = torch.ones(50)
    with pytest.raises(RuntimeError, match=r"implementation = 'cpp': .*or use implementation = 'foreach'"):
        Lion([param], implementation="cpp").step()


def test_a_compiler_that_does_not_know_the_processor(tmp_path, monkeypatch, no_memory_of_builds):
    refuses = 'case "$*" in *-march=native*) echo unknown >&2; exit 1;; esac; exec c++ "$@"'
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", refuses) + " -O1")  # CXX may hold an argument
    assert cpp.library.why_not() is None


def test_a_cache_that_cannot_be_written_costs_a_build_and_nothing_more(tmp_path, monkeypatch, no_memory_of_builds):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpp.library.why_not() is None
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, no_memory_of_builds):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = tmp_path / "megatron-lion" / f"lion-{cpp_compiler._fingerprint(SOURCE, cpp_compiler._compiler())}.so"
    target.parent.mkdir()
    target.write_bytes(b"\x7fELF, or so")
    assert cpp.library.why_not() is None


def test_processes_that_build_at_once_wait_for_one_of_them(tmp_path):
    calls = tmp_path / "calls"
    compiler = script(tmp_path / "cxx", f'case "$*" in *--version*) ;; *) echo >> {calls};; esac; exec c++ "$@"')
    code = "from megatron_lion.optim import cpp; import sys; sys.exit(cpp.library.why_not() is not None)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": compiler}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0, 0]
    assert len(calls.read_text().splitlines()) == 1
    assert len(list((tmp_path / "megatron-lion").glob("*.so"))) == 1


def test_no_offset_is_cut_to_32_bits(tmp_path):
    """The compiler reports every implicit narrowing, so tensors of 2^31 elements and more have 64-bit offsets throughout."""
    strict = ["-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion", "-Werror"]
    command = [*cpp_compiler._compiler(), *cpp_compiler.FLAGS, *strict, str(SOURCE), "-o", str(tmp_path / "strict.so")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr


def test_parameters_elsewhere_are_refused_by_name():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"'cpp' with parameters that are not on the CPU: use 'auto'"):
        Lion([param], implementation="cpp").step()


def test_nan_in_a_packed_block_has_one_form():
    """Byte for byte: a packed momentum is compared and hashed as bytes."""
    ends = []
    for implementation in ("reference", "cpp"):
        param = torch.nn.Parameter(torch.ones(70))
        param.grad = torch.full((70,), float("inf"))
        optimizer = Lion([param], momentum="int8", implementation=implementation)
        optimizer.step()
        ends.append(optimizer.state[param]["exp_avg"])
    assert same_bits(*ends)
    assert ends[0][-2:].tolist() == [0xC0, 0x7F]
