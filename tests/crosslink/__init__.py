"""Cross link for macOS arm64: would the product load on a Mac?

All of csrc is compiled by zig's clang for aarch64-macos against the headers of torch's macOS wheel
and linked with torch's real dylibs. Apple's own libraries are stubs of what torch's dylibs import
from them; every symbol has to be bound. Selectors are not seen by a linker, so the compiler refuses
those the framework headers in tests/softmetal/include do not declare.
"""
