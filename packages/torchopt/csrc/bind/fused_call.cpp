// SPDX-License-Identifier: Apache-2.0
#include "bind/fused_call.h"

#include <optional>
#include <utility>

#include "bind/rule_table.h"
#include "bind/tensors.h"

namespace torchopt {
namespace {

/// The items of a list or tuple.
struct Items {
    explicit Items(const py::object& sequence)
        : fast(py::reinterpret_steal<py::object>(
              PySequence_Fast(sequence.ptr(), "torchopt._C: expected a list or a tuple"))) {
        if (!fast) throw py::error_already_set();
    }
    std::size_t size() const {
        return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr()));
    }
    PyObject* operator[](std::size_t i) const {
        return PySequence_Fast_GET_ITEM(fast.ptr(), static_cast<Py_ssize_t>(i));
    }
    py::object fast;
};

std::optional<std::int64_t> step_number(const py::object& step) {
    if (PyLong_CheckExact(step.ptr())) return step.cast<std::int64_t>();
    return count_of(step.ptr());
}

}  // namespace

py::object fused_call(const std::string& rule_name, int kind_code, const py::object& tensors,
                      std::size_t size, const py::object& needed, const py::object& step,
                      const std::vector<double>& hypers, bool maximize, int num_threads,
                      bool record) {
    if (!can_make_tensors() || size == 0) return py::none();
    const RuleEntry& rule = find_rule(rule_name);
    const Kind kind = find_kind(kind_code);
    const RoleCounts counts = role_counts(rule, kind);
    if (kind == Kind::kStep || kind == Kind::kHyperVjp) refuse("a kind that makes new tensors");
    const Items items(tensors);
    if (items.size() < counts.inputs * size) refuse("too few tensors");
    const std::optional<Items> wanted =
        needed.is_none() ? std::nullopt : std::optional<Items>(needed);
    if (wanted && wanted->size() < counts.outputs * size) refuse("too few answers in 'needed'");
    const std::optional<std::int64_t> number = step_number(step);
    if (!number) return py::none();

    Tensors call;
    call.step = *number;
    std::vector<Dense> like;
    like.reserve(size);
    Reader reader;
    bool graph = false;
    for (std::size_t r = 0; r < counts.inputs; ++r) {
        std::vector<std::uintptr_t>& addresses = call.inputs.emplace_back();
        addresses.reserve(size);
        for (std::size_t i = 0; i < size; ++i) {
            PyObject* const object = items[r * size + i];
            if (object == Py_None && r >= counts.required) {
                addresses.push_back(0);
                continue;
            }
            const std::optional<Dense> x = reader.read(object);
            if (!x || x->device != kCpu) return py::none();
            if (r == 0) {
                like.push_back(*x);
                call.sizes.push_back(x->size);
            }
            if (x->dtype != like[0].dtype || !x->has_shape_of(like[i])) return py::none();
            addresses.push_back(x->address);
            graph = graph || (record && requires_grad(object));
        }
    }
    call.dtype = like[0].dtype;

    py::tuple out(counts.outputs * size);
    for (std::size_t r = 0; r < counts.outputs; ++r) {
        std::vector<std::uintptr_t>& addresses = call.outputs.emplace_back(size, 0);
        for (std::size_t i = 0; i < size; ++i) {
            const std::size_t place = r * size + i;
            if (wanted && (*wanted)[place] != Py_True) {
                out[place] = py::none();
            } else {
                out[place] = make_tensor(like[i], addresses[i]);
            }
        }
    }
    launch(rule, kind, call, hypers, maximize, {num_threads, kCpu, 0, 0});
    return py::make_tuple(std::move(out), graph);
}

py::object successor(const py::object& count) {
    const std::optional<std::int64_t> value = count_of(count.ptr());
    return value ? make_count(*value + 1) : py::none();
}

bool are_one(const py::list& items) {
    for (std::size_t i = 1; i < items.size(); ++i)
        if (PyList_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i)) !=
            PyList_GET_ITEM(items.ptr(), 0))
            return false;
    return true;
}

}  // namespace torchopt
