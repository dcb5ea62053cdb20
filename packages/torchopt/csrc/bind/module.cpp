// SPDX-License-Identifier: Apache-2.0
// The Python names of the extension module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bind/buffers.h"
#include "bind/factored_call.h"
#include "bind/fork.h"
#include "bind/fused_call.h"
#include "bind/newton_schulz_call.h"
#include "bind/rule_table.h"
#include "bind/step_plan.h"
#include "bind/tensors.h"
#if defined(TORCHOPT_WITH_CUDA)
#include "launch/cuda.h"
#endif

namespace py = pybind11;

namespace torchopt {
namespace {

using TensorLists = std::vector<py::list>;

/// The addresses of one role. A tensor that may be absent is given as None and gets the address 0. A tensor with
/// address 0 that has elements has no memory of its own.
std::vector<std::uintptr_t> addresses(const py::list& role, const std::vector<std::int64_t>& sizes,
                                      bool may_be_absent) {
    if (role.size() != sizes.size()) refuse("a role has the wrong number of tensors");
    std::vector<std::uintptr_t> out;
    out.reserve(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        PyObject* const tensor = PyList_GET_ITEM(role.ptr(), static_cast<Py_ssize_t>(i));
        if (may_be_absent && tensor == Py_None) {
            out.push_back(0);
            continue;
        }
        const std::uintptr_t address = address_of(tensor);
        if (address == 0 && sizes[i] != 0) refuse("a tensor has no memory");
        out.push_back(address);
    }
    return out;
}

Tensors collect(const RoleCounts& expected, const TensorLists& inputs, const TensorLists& outputs,
                int dtype) {
    if (inputs.size() != expected.inputs)
        refuse("wrong number of input roles: expected " + std::to_string(expected.inputs) +
               ", got " + std::to_string(inputs.size()));
    if (outputs.size() != expected.outputs)
        refuse("wrong number of output roles: expected " + std::to_string(expected.outputs) +
               ", got " + std::to_string(outputs.size()));
    if (dtype < 0 || dtype > static_cast<int>(Dtype::kBFloat16)) refuse("unknown dtype code");
    Tensors tensors;
    tensors.dtype = static_cast<Dtype>(dtype);
    for (std::size_t i = 0; i < inputs[0].size(); ++i)
        tensors.sizes.push_back(
            size_of(PyList_GET_ITEM(inputs[0].ptr(), static_cast<Py_ssize_t>(i))));
    for (std::size_t r = 0; r < inputs.size(); ++r)
        tensors.inputs.push_back(addresses(inputs[r], tensors.sizes, r >= expected.required));
    for (const py::list& role : outputs)
        tensors.outputs.push_back(
            addresses(role, tensors.sizes, expected.required < expected.inputs));
    return tensors;
}

/// Takes one number for all tensors, or a list with a 0-dim int64 tensor for each. The parameter is not a variant with
/// an integer: pybind11 accepts every object with __index__ as one, and that of a tensor waits for its device.
void set_steps(Tensors& tensors, const py::object& steps) {
    if (PyLong_Check(steps.ptr())) {
        tensors.step = steps.cast<std::int64_t>();
        return;
    }
    if (!PyList_Check(steps.ptr())) refuse("expected the steps as a number or a list");
    const auto list = py::reinterpret_borrow<py::list>(steps);
    if (list.size() != tensors.sizes.size()) refuse("expected one step for each tensor");
    const PyObject* previous = nullptr;
    for (std::size_t i = 0; i < list.size(); ++i) {
        PyObject* const step = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
        tensors.steps.push_back(step == previous ? tensors.steps.back() : address_of(step));
        previous = step;
    }
}

std::vector<double> run(const std::string& rule_name, int kind_code, const TensorLists& inputs,
                        const TensorLists& outputs, const py::object& steps, int dtype,
                        const std::vector<double>& hypers, bool maximize, int num_threads,
                        int device, std::uintptr_t stream, std::uintptr_t partials) {
    const Kind kind = find_kind(kind_code);
    const RuleEntry& rule = find_rule(rule_name);
    if (inputs.empty()) refuse("wrong number of input roles: expected at least 1, got 0");
    Tensors tensors = collect(role_counts(rule, kind), inputs, outputs, dtype);
    set_steps(tensors, steps);
    return launch(rule, kind, tensors, hypers, maximize, {num_threads, device, stream, partials});
}

}  // namespace
}  // namespace torchopt

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    using namespace torchopt;
    forks::watch();
    module.doc() = "Fused optimizer kernels. Private: use torchopt's Python functions.";
    module.attr("FLOAT32") = static_cast<int>(Dtype::kFloat32);
    module.attr("FLOAT64") = static_cast<int>(Dtype::kFloat64);
    module.attr("FLOAT16") = static_cast<int>(Dtype::kFloat16);
    module.attr("BFLOAT16") = static_cast<int>(Dtype::kBFloat16);
    module.attr("UPDATE") = static_cast<int>(Kind::kUpdate);
    module.attr("DECAYED_UPDATE") = static_cast<int>(Kind::kDecayedUpdate);
    module.attr("STEP") = static_cast<int>(Kind::kStep);
    module.attr("UPDATE_VJP") = static_cast<int>(Kind::kUpdateVjp);
    module.attr("DECAYED_UPDATE_VJP") = static_cast<int>(Kind::kDecayedUpdateVjp);
    module.attr("HYPER_VJP") = static_cast<int>(Kind::kHyperVjp);
#if defined(TORCHOPT_WITH_CUDA)
    module.attr("WITH_CUDA") = true;
    module.attr("CUDA_BLOCK_ELEMENTS") = kCudaBlockElements;
    module.attr("CUDA_ARCHITECTURES") = TORCHOPT_CUDA_ARCHITECTURES;
#else
    module.attr("WITH_CUDA") = false;
    module.attr("CUDA_BLOCK_ELEMENTS") = 0;
    module.attr("CUDA_ARCHITECTURES") = "";
#endif
#if defined(_OPENMP)
    module.attr("WITH_OPENMP") = true;
#else
    module.attr("WITH_OPENMP") = false;
#endif
    py::dict table;
    for (const RuleEntry& rule : rule_table())
        table[rule.name] = py::make_tuple(rule.states, rule.hypers);
    module.attr("RULES") = table;
    module.def("run", &run,
               "Run a kernel of a rule over lists of tensors; return the cotangents of the "
               "hyper-parameters.",
               py::arg("rule"), py::arg("kind"), py::arg("inputs"), py::arg("outputs"),
               py::arg("steps"), py::arg("dtype"), py::arg("hypers"), py::kw_only(),
               py::arg("maximize"), py::arg("num_threads"), py::arg("device") = kCpu,
               py::arg("stream") = 0, py::arg("partials") = 0);
    module.def("fused_call", &fused_call,
               "Compute an update or its derivative of plain tensors on the CPU in new tensors; "
               "return None for other tensors.",
               py::arg("rule"), py::arg("kind"), py::arg("tensors"), py::arg("size"),
               py::arg("needed"), py::arg("step"), py::arg("hypers"), py::arg("maximize"),
               py::arg("num_threads"), py::arg("record"));
    module.def("factored_rms", &factored_rms_call,
               "Compute Adafactor's step of plain tensors on the CPU; return None for other "
               "tensors.",
               py::arg("grads"), py::arg("params"), py::arg("rows"), py::arg("columns"),
               py::arg("hypers"), py::arg("inplace"), py::arg("num_threads"));
    module.def(
        "newton_schulz", &newton_schulz_call,
        "Compute Muon's iteration of plain matrices on the CPU; return None for each other or "
        "too large matrix, and None if there are only such.",
        py::arg("matrices"), py::arg("scales"), py::arg("steps"), py::arg("a"), py::arg("b"),
        py::arg("c"), py::arg("eps"), py::arg("num_threads"));
    module.def("successor", &successor, "The 0-dim int64 tensor count + 1; None for other objects.",
               py::arg("count"));
    module.def("are_one", &are_one, "Whether all items are the same object.", py::arg("items"));
    module.def("are_disjoint", &are_disjoint,
               "Whether no two of these plain, dense tensors share memory.", py::arg("tensors"));
    module.def("learn_tensors", &learn_tensors,
               "Register torch's tensor classes and dtypes. Called once.", py::arg("classes"),
               py::arg("dtypes"), py::arg("exchange"));
    module.def("learn_negation", &learn_negation,
               "Find out where torch keeps that a negation is pending; return whether that is "
               "clear. Called once.",
               py::arg("plain"), py::arg("negated"));
    module.def("release_buffers", &buffers::release, "Free the memory kept for new tensors.");
    module.def("set_buffer_limit", &buffers::set_limit,
               "Limit the bytes kept for new tensors; return the previous limit.",
               py::arg("limit"));
    module.def(
        "buffer_usage",
        [] {
            const buffers::Usage usage = buffers::usage();
            return py::make_tuple(usage.kept, usage.used);
        },
        "Bytes kept for new tensors, and bytes in tensors made from such memory.");
    py::class_<StepPlan>(module, "StepPlan")
        .def(py::init<const std::string&, py::list, std::vector<py::list>>(), py::arg("rule"),
             py::arg("params"), py::arg("states"))
        .def("advance", &StepPlan::advance, py::arg("grads"), py::arg("counts"), py::arg("hypers"),
             py::arg("maximize"), py::arg("num_threads"), py::arg("launch") = true)
        .def("run", &StepPlan::run, py::arg("grads"), py::arg("step"), py::arg("hypers"),
             py::arg("maximize"), py::arg("num_threads"), py::arg("device"), py::arg("stream"),
             py::arg("launch") = true)
        .def("launch", &StepPlan::launch);
}
