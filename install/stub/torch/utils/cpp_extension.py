"""Build-time stand-in for torch.utils.cpp_extension, seen only while fairseq's setup.py runs.

fairseq's setup.py imports this module to declare C++ extensions that need torch's headers. We use
none of them, and leaving them out makes the build several times faster. The plain Cython and C
extensions are still built.
"""

from setuptools import Extension
from setuptools.command.build_ext import build_ext


class _LeftOut(Extension):
    """An extension that is declared and not built."""


def CppExtension(name, sources, **options):  # noqa: N802 - fairseq's setup.py calls it by this name
    return _LeftOut(name, sources, **options)


class BuildExtension(build_ext):
    """Builds what is left."""

    def finalize_options(self):
        modules = self.distribution.ext_modules or []
        self.distribution.ext_modules = [m for m in modules if not isinstance(m, _LeftOut)]
        super().finalize_options()
