// The Python door of the native module. It takes addresses, sizes and streams, and no torch header:
// one binary serves every torch version. No operator is native yet; the module says how it was built.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

static std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown compiler";
#endif
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native (C++) implementations of the mics_kernels operators.";
    module.def("build_info", [] {
        py::dict info;
        info["compiler"] = compiler();
        info["cuda"] = false;
        return info;
    });
}
