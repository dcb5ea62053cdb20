// SPDX-License-Identifier: Apache-2.0
// The Python names. Nothing of torch is known here but four methods of its tensors: data_ptr, numel, is_contiguous and
// the attribute dtype, called through Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "launch/openmp.h"
#include "launch/tensors.h"
#include "math/rules.h"
#if defined(TORCHOPT_WITH_CUDA)
#include "launch/cuda.h"
#endif

namespace py = pybind11;

namespace torchopt {
namespace {

constexpr int kCpu = -1;

/// One row of the table of rules, with its types erased.
struct RuleEntry {
    const char* name;
    int states;
    int hypers;
    void (*run_on_cpu)(const CpuLaunch&);
#if defined(TORCHOPT_WITH_CUDA)
    void (*run_on_cuda)(const CudaLaunch&);
#endif
};

#if defined(TORCHOPT_WITH_CUDA)
#define TORCHOPT_ENTRY(NAME)                                                                      \
    RuleEntry{#NAME, rules::NAME::kStates, Chain<rules::NAME>::kHypers, &run_on_cpu<rules::NAME>, \
              &run_on_cuda<rules::NAME>},
#else
#define TORCHOPT_ENTRY(NAME) \
    RuleEntry{#NAME, rules::NAME::kStates, Chain<rules::NAME>::kHypers, &run_on_cpu<rules::NAME>},
#endif

}  // namespace

#define TORCHOPT_DECLARE(NAME) \
    template <>                \
    void run_on_cpu<rules::NAME>(const CpuLaunch&);
TORCHOPT_FOR_EACH_RULE(TORCHOPT_DECLARE)
#if defined(TORCHOPT_WITH_CUDA)
#define TORCHOPT_DECLARE_CUDA(NAME) \
    template <>                     \
    void run_on_cuda<rules::NAME>(const CudaLaunch&);
TORCHOPT_FOR_EACH_RULE(TORCHOPT_DECLARE_CUDA)
#endif

namespace {

const RuleEntry kRules[] = {TORCHOPT_FOR_EACH_RULE(TORCHOPT_ENTRY)};

[[noreturn]] void refuse(const std::string& what) {
    throw std::invalid_argument("torchopt._C: " + what);
}

const RuleEntry& find_rule(const std::string& name) {
    for (const RuleEntry& entry : kRules)
        if (name == entry.name) return entry;
    refuse("there is no rule named '" + name + "'");
}

/// How many tensors of each index a kernel reads and writes.
struct RoleCounts {
    std::size_t inputs, outputs;
};

RoleCounts role_counts(const RuleEntry& rule, Kind kind) {
    const auto states = static_cast<std::size_t>(rule.states);
    const std::size_t outputs = 1 + states;
    switch (kind) {
        case Kind::kUpdate: return {1 + states, outputs};
        case Kind::kDecayedUpdate:
        case Kind::kStep: return {2 + states, outputs};
        case Kind::kUpdateVjp: return {1 + states + outputs, 1 + states};
        case Kind::kDecayedUpdateVjp:
        case Kind::kHyperVjp: return {2 + states + outputs, 2 + states};
    }
    refuse("unknown kind");
}

/// The names of the methods called on tensors, made once.
struct Names {
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* numel = PyUnicode_InternFromString("numel");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
};

const Names& names() {
    static const Names instance;
    return instance;
}

/// The result of a method without arguments; throws what the method raised.
py::object call(PyObject* object, PyObject* name) {
    PyObject* result = PyObject_CallMethodNoArgs(object, name);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

std::uintptr_t address_of(PyObject* tensor) {
    const py::object pointer = call(tensor, names().data_ptr);
    const std::size_t address = PyLong_AsSize_t(pointer.ptr());
    if (address == static_cast<std::size_t>(-1) && PyErr_Occurred() != nullptr)
        throw py::error_already_set();
    return address;
}

std::int64_t size_of(PyObject* tensor) {
    const py::object size = call(tensor, names().numel);
    const long long value = PyLong_AsLongLong(size.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
}

using TensorLists = std::vector<py::list>;

/// The addresses of one role. A tensor whose address is 0 but which has elements has no memory of its own.
std::vector<std::uintptr_t> addresses(const py::list& role,
                                      const std::vector<std::int64_t>& sizes) {
    if (role.size() != sizes.size()) refuse("a role has the wrong number of tensors");
    std::vector<std::uintptr_t> out;
    out.reserve(sizes.size());
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const std::uintptr_t address =
            address_of(PyList_GET_ITEM(role.ptr(), static_cast<Py_ssize_t>(i)));
        if (address == 0 && sizes[i] != 0) refuse("a tensor has no memory");
        out.push_back(address);
    }
    return out;
}

Tensors collect(const RuleEntry& rule, Kind kind, const TensorLists& inputs,
                const TensorLists& outputs, int dtype) {
    const RoleCounts expected = role_counts(rule, kind);
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
    for (const py::list& role : inputs) tensors.inputs.push_back(addresses(role, tensors.sizes));
    for (const py::list& role : outputs) tensors.outputs.push_back(addresses(role, tensors.sizes));
    return tensors;
}

void set_steps(Tensors& tensors, const std::variant<std::int64_t, py::list>& steps) {
    if (const auto* step = std::get_if<std::int64_t>(&steps)) {
        tensors.step = *step;
        return;
    }
    const auto& list = std::get<py::list>(steps);
    if (list.size() != tensors.sizes.size()) refuse("expected one step for each tensor");
    const PyObject* previous = nullptr;
    for (std::size_t i = 0; i < list.size(); ++i) {
        PyObject* const step = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
        tensors.steps.push_back(step == previous ? tensors.steps.back() : address_of(step));
        previous = step;
    }
}

/// Where and how a launch runs.
struct Placement {
    int num_threads;
    int device;
    std::uintptr_t stream;
    std::uintptr_t partials;
};

/// Runs without the interpreter lock; returns the cotangents of the hyper-parameters (on the CPU; else they are in
/// `partials`).
std::vector<double> launch(const RuleEntry& rule, Kind kind, const Tensors& tensors,
                           const std::vector<double>& hypers, bool maximize,
                           const Placement& placement) {
    if (hypers.size() != static_cast<std::size_t>(rule.hypers))
        refuse("wrong number of hyper-parameters: expected " + std::to_string(rule.hypers) +
               ", got " + std::to_string(hypers.size()));
    std::vector<double> cotangents(kind == Kind::kHyperVjp ? hypers.size() : 0, 0.0);
    const py::gil_scoped_release no_gil;
    if (placement.device == kCpu) {
        rule.run_on_cpu(
            {kind, tensors, hypers, maximize, placement.num_threads, cotangents.data()});
        return cotangents;
    }
#if defined(TORCHOPT_WITH_CUDA)
    rule.run_on_cuda({kind, tensors, hypers, maximize, placement.device, placement.stream,
                      reinterpret_cast<double*>(placement.partials)});
    return cotangents;
#else
    throw std::runtime_error(
        "torchopt was built without CUDA kernels; rebuild it with TORCHOPT_CUDA=ON");
#endif
}

std::vector<double> run(const std::string& rule_name, int kind_code, const TensorLists& inputs,
                        const TensorLists& outputs,
                        const std::variant<std::int64_t, py::list>& steps, int dtype,
                        const std::vector<double>& hypers, bool maximize, int num_threads,
                        int device, std::uintptr_t stream, std::uintptr_t partials) {
    if (kind_code < 0 || kind_code > static_cast<int>(Kind::kHyperVjp)) refuse("unknown kind");
    const RuleEntry& rule = find_rule(rule_name);
    const auto kind = static_cast<Kind>(kind_code);
    if (inputs.empty()) refuse("wrong number of input roles: expected at least 1, got 0");
    Tensors tensors = collect(rule, kind, inputs, outputs, dtype);
    set_steps(tensors, steps);
    return launch(rule, kind, tensors, hypers, maximize, {num_threads, device, stream, partials});
}

/// A step in place on parameters and states that stay the same from step to step.
///
/// Made after the caller has checked that the tensors of one index agree in shape, dtype, device and strides and that
/// they are contiguous. What is remembered is compared with the tensors before each step.
class StepPlan {
  public:
    StepPlan(const std::string& rule_name, py::list params, TensorLists states, py::object dtype,
             int dtype_code)
        : rule_(&find_rule(rule_name)),
          params_(std::move(params)),
          states_(std::move(states)),
          dtype_(std::move(dtype)) {
        TensorLists inputs{params_};  // in the place of the gradients, which are not known yet
        inputs.insert(inputs.end(), states_.begin(), states_.end());
        inputs.push_back(params_);
        TensorLists outputs{params_};
        outputs.insert(outputs.end(), states_.begin(), states_.end());
        tensors_ = collect(*rule_, Kind::kStep, inputs, outputs, dtype_code);
    }

    /// Steps and returns true; or does nothing and returns false, where the gradients do not fit (missing, of another
    /// size, dtype or layout) or where a tensor has moved.
    bool run(const py::list& grads, const std::variant<std::int64_t, py::list>& steps,
             const std::vector<double>& hypers, bool maximize, int num_threads, int device,
             std::uintptr_t stream) const {
        if (!unmoved(params_, tensors_.outputs[0])) return false;
        for (std::size_t r = 0; r < states_.size(); ++r)
            if (!unmoved(states_[r], tensors_.outputs[1 + r])) return false;
        Tensors tensors = tensors_;  // a copy: other threads may run the plan meanwhile
        if (!take_gradients(grads, tensors)) return false;
        set_steps(tensors, steps);
        launch(*rule_, Kind::kStep, tensors, hypers, maximize, {num_threads, device, stream, 0});
        return true;
    }

  private:
    static bool unmoved(const py::list& role, const std::vector<std::uintptr_t>& expected) {
        if (role.size() != expected.size()) return false;
        for (std::size_t i = 0; i < expected.size(); ++i)
            if (address_of(PyList_GET_ITEM(role.ptr(), static_cast<Py_ssize_t>(i))) != expected[i])
                return false;
        return true;
    }

    bool take_gradients(const py::list& grads, Tensors& tensors) const {
        if (grads.size() != tensors.sizes.size()) return false;
        for (std::size_t i = 0; i < grads.size(); ++i) {
            PyObject* const g = PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i));
            if (g == Py_None || size_of(g) != tensors.sizes[i]) return false;
            if (call(g, names().is_contiguous).ptr() != Py_True) return false;
            const auto dtype =
                py::reinterpret_steal<py::object>(PyObject_GetAttr(g, names().dtype));
            if (!dtype) throw py::error_already_set();
            if (!dtype.is(dtype_)) return false;
            tensors.inputs[0][i] = address_of(g);
            if (tensors.inputs[0][i] == 0 && tensors.sizes[i] != 0) return false;
        }
        return true;
    }

    const RuleEntry* rule_;
    py::list params_;
    TensorLists states_;
    py::object dtype_;
    Tensors tensors_;
};

}  // namespace
}  // namespace torchopt

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
    using namespace torchopt;
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
#else
    module.attr("WITH_CUDA") = false;
    module.attr("CUDA_BLOCK_ELEMENTS") = 0;
#endif
#if defined(_OPENMP)
    module.attr("WITH_OPENMP") = true;
#else
    module.attr("WITH_OPENMP") = false;
#endif
    py::dict table;
    for (const RuleEntry& rule : kRules)
        table[rule.name] = py::make_tuple(rule.states, rule.hypers);
    module.attr("RULES") = table;
    module.def("run", &run,
               "Run a kernel of a rule over lists of tensors; return the cotangents of the "
               "hyper-parameters.",
               py::arg("rule"), py::arg("kind"), py::arg("inputs"), py::arg("outputs"),
               py::arg("steps"), py::arg("dtype"), py::arg("hypers"), py::kw_only(),
               py::arg("maximize"), py::arg("num_threads"), py::arg("device") = kCpu,
               py::arg("stream") = 0, py::arg("partials") = 0);
    py::class_<StepPlan>(module, "StepPlan")
        .def(py::init<const std::string&, py::list, TensorLists, py::object, int>(),
             py::arg("rule"), py::arg("params"), py::arg("states"), py::arg("dtype"),
             py::arg("dtype_code"))
        .def("run", &StepPlan::run, py::arg("grads"), py::arg("steps"), py::arg("hypers"),
             py::arg("maximize"), py::arg("num_threads"), py::arg("device"), py::arg("stream"));
}
