"""The build cache, the embedding of Metal sources and what happens without the tools."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from . import build, configure, embed
from .requirement import missing


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    if reason := build.unavailable_reason():
        missing(reason)
    monkeypatch.setenv("KVQ_SOFTMETAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_library_is_built_once_per_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "part.h").write_text("#define VALUE 1\n")
    source = cache / "part.cpp"
    source.write_text('#include "part.h"\nextern "C" int value() { return VALUE; }\n')
    target = build.Target("part", [source])
    commands: list[str] = []
    run = build.run
    monkeypatch.setattr(build, "run", lambda command: (commands.append(command[-1]), run(command)))

    first = build.build(target)
    assert len(commands) == 2
    assert build.build(target) == first
    assert len(commands) == 2
    (cache / "part.h").write_text("#define VALUE 2\n")
    second = build.build(target)
    assert second != first and len(commands) == 4
    (cache / "part.h").write_text("#define VALUE 1\n")
    assert build.build(target) == first
    assert len(commands) == 4


def test_a_compiler_error_is_shown(cache: Path) -> None:
    source = cache / "bad.mm"
    source.write_text(
        "#import <Metal/Metal.h>\nvoid f(id<MTLDevice> device) { [device noSuchMethod]; }\n"
    )
    with pytest.raises(build.BuildError, match="noSuchMethod"):
        build.build(build.Target("bad", [source]))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILER", "no-such-compiler")
    monkeypatch.setattr(build.sys, "platform", "linux")
    assert build.unavailable_reason() == "no-such-compiler is missing (apt install clang-19)"
    with pytest.raises(build.Unavailable, match="no-such-compiler"):
        build.build(build.Target("nothing", []))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="no setting 'speed'"):
        configure(speed=1)
    with pytest.raises(ValueError, match="mode must be one of"):
        configure(mode="quick")


def test_flatten_puts_each_include_in_once(tmp_path: Path) -> None:
    (tmp_path / "common.h").write_text("#pragma once\nconstant int one = 1;\n")
    (tmp_path / "part.h").write_text('#pragma once\n#include "common.h"\nconstant int two = 2;\n')
    main = tmp_path / "main.metal"
    main.write_text('#include <metal_stdlib>\n#include "part.h"\n#include "common.h"\nint three;\n')
    text = embed.flatten(main)
    assert text.count("one = 1") == text.count("two = 2") == 1
    assert "#include <metal_stdlib>" in text and '#include "' not in text
    # Each remaining line is numbered as in its own file.
    lines = preprocess(text, tmp_path)
    assert lines["constant int one = 1;"] == ("common.h", 2)
    assert lines["constant int two = 2;"] == ("part.h", 3)
    assert lines["int three;"] == ("main.metal", 4)


def preprocess(text: str, folder: Path) -> dict[str, tuple[str, int]]:
    """Where #line directives say each line comes from."""
    found = {}
    name, number = "", 0
    for line in text.splitlines():
        if line.startswith("#line"):
            _, at, quoted = line.split()
            name, number = quoted.strip('"'), int(at)
            continue
        found[line] = (name, number)
        number += 1
    return found


def test_flatten_names_a_missing_include(tmp_path: Path) -> None:
    main = tmp_path / "main.metal"
    main.write_text('#include "nowhere.h"\n')
    with pytest.raises(FileNotFoundError, match=r"nowhere\.h"):
        embed.flatten(main)


def test_header_compiles(cache: Path) -> None:
    header = embed.header({"b": 'text with "quotes" and \\', "a": "one\ntwo"})
    source = cache / "check.cpp"
    source.write_text(
        "#include <cstddef>\nnamespace kvq::runtime { struct EmbeddedLibrary { const char* name;"
        " const char* source; const unsigned char* metallib; size_t size; }; }\n"
        + header
        + "using namespace kvq::runtime;\n"
        "static_assert(kEmbeddedLibraries[0].source[3] == '\\n');\n"
        "static_assert(kEmbeddedLibraries[1].name[0] == 'b' && !kEmbeddedLibraries[2].name);\n"
    )
    subprocess.run(
        [build.COMPILER, "-std=c++20", "-x", "c++", "-fsyntax-only", str(source)], check=True
    )


def test_a_missing_tool_skips_but_fails_where_all_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KVQ_REQUIRE_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no tool"):
        missing("no tool")
    monkeypatch.setenv("KVQ_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match="KVQ_REQUIRE_ALL=1: no tool"):
        missing("no tool")
