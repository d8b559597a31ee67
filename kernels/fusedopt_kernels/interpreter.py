"""Triton's interpreter without what it does again and again: the same results in half the time.

Every call of a device function puts the interpreted operations into ``triton.language`` anew, a few hundred
attributes, though the kernel that calls it has put them there and takes them out at its end.
"""

from functools import cache
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@cache
def patch_language_once() -> None:
    """Let device functions find the language as their kernel left it: for a process of one's own, as a worker is.

    Does nothing where Triton's interpreter is built otherwise: results are the same, they only come later.
    """
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope")):
        return
    patch = interpreter._patch_lang

    @cache
    def seen_by(fn: Any) -> list[Any]:
        return [module for module in (tl, core) if any(value is module for value in fn.__globals__.values())]

    def once(fn: Any) -> Any:
        modules = seen_by(fn)
        interpreted = modules and not any(core.is_builtin(module.load) for module in modules)
        return interpreter._LangPatchScope() if interpreted else patch(fn)

    interpreter._patch_lang = once
