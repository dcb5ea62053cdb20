// SPDX-License-Identifier: Apache-2.0
// The Python names: addresses, sizes, a dtype code, a device index and a stream go in; nothing of torch is known here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "launch/openmp.h"
#include "launch/tensors.h"
#if defined(TORCHOPT_WITH_CUDA)
#include "launch/cuda.h"
#endif

namespace py = pybind11;

namespace torchopt {
namespace {

using Addresses = std::vector<std::vector<std::uintptr_t>>;
constexpr int kCpu = -1;

template <class Rule>
void check_tensors(const Tensors& tensors) {
    const std::size_t n = tensors.sizes.size();
    const auto require = [](bool ok, const char* what) {
        if (!ok) throw std::invalid_argument(std::string("torchopt._C: ") + what);
    };
    require(tensors.inputs.size() == Rule::kInputs, "wrong number of input roles");
    require(tensors.outputs.size() == Rule::kOutputs, "wrong number of output roles");
    require(tensors.steps.size() == n, "expected one step address for each tensor");
    for (const auto& role : tensors.inputs)
        require(role.size() == n, "an input role has the wrong length");
    for (const auto& role : tensors.outputs)
        require(role.size() == n, "an output role has the wrong length");
    require(tensors.dtype == Dtype::kFloat32 || tensors.dtype == Dtype::kFloat64,
            "unknown dtype code");
    for (std::int64_t size : tensors.sizes) require(size >= 0, "a size is negative");
}

template <class Rule>
void run(Addresses inputs, Addresses outputs, std::vector<std::uintptr_t> steps,
         std::vector<std::int64_t> sizes, int dtype, const typename Rule::Hyper& hyper,
         int num_threads, int device, std::uintptr_t stream) {
    const Tensors tensors{std::move(inputs), std::move(outputs), std::move(steps), std::move(sizes),
                          static_cast<Dtype>(dtype)};
    check_tensors<Rule>(tensors);
    const py::gil_scoped_release no_gil;
    if (device == kCpu) {
        run_on_cpu<Rule>(tensors, hyper, num_threads);
        return;
    }
#if defined(TORCHOPT_WITH_CUDA)
    run_on_cuda<Rule>(tensors, hyper, device, stream);
#else
    (void)stream;
    throw std::runtime_error(
        "torchopt was built without CUDA kernels; rebuild it with TORCHOPT_CUDA=ON");
#endif
}

template <class Rule>
void bind_adam(py::module_& module, const char* name, const char* doc) {
    module.def(
        name,
        [](Addresses inputs, Addresses outputs, std::vector<std::uintptr_t> steps,
           std::vector<std::int64_t> sizes, int dtype, double b1, double b2, double eps,
           double eps_root, int num_threads, int device, std::uintptr_t stream) {
            run<Rule>(std::move(inputs), std::move(outputs), std::move(steps), std::move(sizes),
                      dtype, AdamHyper{b1, b2, eps, eps_root}, num_threads, device, stream);
        },
        doc, py::arg("inputs"), py::arg("outputs"), py::arg("steps"), py::arg("sizes"),
        py::arg("dtype"), py::kw_only(), py::arg("b1"), py::arg("b2"), py::arg("eps"),
        py::arg("eps_root"), py::arg("num_threads"), py::arg("device") = kCpu,
        py::arg("stream") = 0);
}

}  // namespace
}  // namespace torchopt

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    using namespace torchopt;
    module.doc() =
        "Fused optimizer kernels on raw addresses. Private: use torchopt's Python functions.";
    module.attr("FLOAT32") = static_cast<int>(Dtype::kFloat32);
    module.attr("FLOAT64") = static_cast<int>(Dtype::kFloat64);
#if defined(TORCHOPT_WITH_CUDA)
    module.attr("WITH_CUDA") = true;
#else
    module.attr("WITH_CUDA") = false;
#endif
#if defined(_OPENMP)
    module.attr("WITH_OPENMP") = true;
#else
    module.attr("WITH_OPENMP") = false;
#endif
    bind_adam<Adam>(module, "adam", "inputs g, mu, nu; outputs u, mu', nu'.");
    bind_adam<Vjp<Adam>>(
        module, "adam_vjp",
        "inputs g, mu, nu, and the cotangents of u, mu', nu'; outputs those of g, mu, nu.");
}
