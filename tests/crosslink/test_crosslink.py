"""All of csrc compiles and links for macOS arm64 against torch's macOS wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from softmetal import embed
from softmetal.requirement import missing

from .link import ROOT, SOFTMETAL, LinkError, MacBuild
from .macho import imports
from .stubs import FOUNDATION, METAL, PYTHON
from .wheel import CACHE, Unavailable

pytestmark = pytest.mark.crosslink

CSRC = ROOT / "csrc"
DEMO = SOFTMETAL / "demo"
ALLOWED = {
    "@rpath/libc10.dylib",
    "@rpath/libtorch_cpu.dylib",
    "@rpath/libtorch_python.dylib",
    FOUNDATION,
    METAL,
    "/usr/lib/libSystem.B.dylib",
    "/usr/lib/libc++.1.dylib",
    "/usr/lib/libobjc.A.dylib",
    PYTHON,
}


@pytest.fixture(scope="module")
def mac() -> MacBuild:
    try:
        return MacBuild(CACHE / "crosslink")  # always the same path, so that zig's cache helps
    except Unavailable as reason:
        missing(str(reason))


def host_flags(mac: MacBuild, metal: Path) -> list[str]:
    """Flags for .mm files, with the Metal sources of a folder embedded."""
    generated = mac.folder / metal.name
    embed.embed(metal, generated / "metal_libraries.h", [CSRC])
    return [f"-I{generated}"]


def product_sources(mac: MacBuild) -> list[tuple[Path, Sequence[str]]]:
    host = host_flags(mac, ROOT / "metal")
    kernels = CSRC / "cpu" / "kernels"
    found: list[tuple[Path, Sequence[str]]] = []
    for path in sorted(CSRC.rglob("*")):
        if path.suffix == ".mm":
            found.append((path, host))
        elif path.suffix == ".cpp":
            found.append((path, ["-DKVQ_ISA=baseline"] if path.parent == kernels else []))
    return found


def write(mac: MacBuild, name: str, text: str) -> Path:
    path = mac.folder / name
    path.write_text(text)
    return path


def test_product_links_with_every_symbol_bound(mac: MacBuild) -> None:
    library = mac.link(mac.compile_all(product_sources(mac)))
    found = imports(library)
    assert {item.library for item in found} <= ALLOWED
    # Its host code is in it and is torch's public MPS API's customer.
    assert any("3mps18get_command_buffer" in item.symbol for item in found)


def test_demo_host_code_links(mac: MacBuild) -> None:
    flags = [*host_flags(mac, DEMO), f"-I{DEMO}"]
    objects = mac.compile_all([(DEMO / "demo.mm", flags), (CSRC / "mps" / "runtime.mm", flags)])
    library = mac.link(objects, "demo.so")
    assert {item.library for item in imports(library)} <= ALLOWED


def test_made_up_torch_function_fails_the_link(mac: MacBuild) -> None:
    source = write(
        mac,
        "made_up.cpp",
        "namespace torch::mps { void no_such_function(); }\n"
        'extern "C" void call() { torch::mps::no_such_function(); }\n',
    )
    with pytest.raises(LinkError, match=r"undefined symbol.*no_such_function"):
        mac.link([mac.compile(source)], "made_up.so")


def test_made_up_class_fails_the_link(mac: MacBuild) -> None:
    source = write(
        mac,
        "made_up_class.mm",
        "#import <Foundation/Foundation.h>\n"
        "@interface MTLNoSuchClass : NSObject\n@end\n"
        'extern "C" id make() { return [MTLNoSuchClass new]; }\n',
    )
    with pytest.raises(LinkError, match=r"undefined symbol.*MTLNoSuchClass"):
        mac.link([mac.compile(source)], "made_up_class.so")


def test_made_up_selector_fails_the_compiler(mac: MacBuild) -> None:
    source = write(
        mac,
        "made_up_selector.mm",
        "#import <Metal/Metal.h>\n"
        'extern "C" void encode(id<MTLComputeCommandEncoder> encoder) {\n'
        "  [encoder setBuffers:nil offset:0 atIndex:0];\n}\n",
    )
    with pytest.raises(LinkError, match="setBuffers:offset:atIndex:"):
        mac.compile(source)
