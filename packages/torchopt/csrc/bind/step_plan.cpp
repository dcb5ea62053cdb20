// SPDX-License-Identifier: Apache-2.0
#include "bind/step_plan.h"

#include <algorithm>
#include <utility>

#include "bind/fork.h"
#include "bind/fused_call.h"

namespace torchopt {
namespace {

/// Marks a plan as running unless another thread of this process runs it.
class Running {
  public:
    explicit Running(std::atomic<std::uint64_t>& of) : of_(of) {
        std::uint64_t found = of_.load();
        const std::uint64_t here = forks::generation();
        owns_ = found != here && of_.compare_exchange_strong(found, here);
    }
    ~Running() {
        if (owns_) of_.store(0);
    }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;
    bool owns() const { return owns_; }

  private:
    std::atomic<std::uint64_t>& of_;
    bool owns_ = false;
};

}  // namespace

StepPlan::StepPlan(const std::string& rule, py::list params, std::vector<py::list> states)
    : rule_(&find_rule(rule)), params_(std::move(params)), states_(std::move(states)) {
    const auto count = static_cast<std::size_t>(params_.size());
    if (states_.size() != static_cast<std::size_t>(rule_->states)) refuse("wrong number of states");
    for (std::size_t i = 0; i < count; ++i) {
        const std::optional<Dense> p = reader_.read(params_[i].ptr());
        if (!p) refuse("a parameter cannot be stepped in place");
        if (i == 0) {
            tensors_.dtype = p->dtype;
            device_ = p->device;
        }
        tensors_.sizes.push_back(p->size);
        written_.push_back(span_of(*p));
    }
    const auto addresses = [&](const py::list& role) {
        if (role.size() != count) refuse("a role has the wrong number of tensors");
        std::vector<std::uintptr_t> out;
        for (std::size_t i = 0; i < count; ++i) {
            const std::optional<Dense> x = reader_.read(role[i].ptr());
            if (!x || x->size != tensors_.sizes[i] || x->dtype != tensors_.dtype ||
                x->device != device_)
                refuse("a tensor cannot be stepped in place");
            out.push_back(x->address);
            written_.push_back(span_of(*x));
        }
        return out;
    };
    tensors_.inputs.emplace_back(count);  // the gradients are not known yet
    tensors_.outputs.push_back(addresses(params_));
    written_.resize(count);  // already filled with the parameters
    for (const py::list& role : states_) {
        tensors_.inputs.push_back(addresses(role));
        tensors_.outputs.push_back(tensors_.inputs.back());
    }
    tensors_.inputs.push_back(tensors_.outputs[0]);
    apart_.assign(count, 0);
    if (!sort_disjoint(written_)) refuse("tensors share memory");
}

bool StepPlan::run(const py::list& grads, const py::object& step, const py::object& hypers,
                   bool maximize, int num_threads, int device, std::uintptr_t stream, bool launch) {
    const Running running(running_);
    if (!running.owns() || device != device_) return false;
    if (!unmoved(params_, tensors_.outputs[0])) return false;
    for (std::size_t r = 0; r < states_.size(); ++r)
        if (!unmoved(states_[r], tensors_.outputs[1 + r])) return false;
    if (!take_gradients(grads) || !take_step(step)) return false;
    if (hypers_.ptr() != hypers.ptr()) {
        numbers_ = hypers.cast<std::vector<double>>();
        hypers_ = PyTuple_CheckExact(hypers.ptr()) ? hypers : py::object();
    }
    maximize_ = maximize;
    placement_ = {num_threads, device, stream, 0};
    if (launch) torchopt::launch(*rule_, Kind::kStep, tensors_, numbers_, maximize_, placement_);
    return true;
}

void StepPlan::launch() {
    const Running running(running_);
    if (!running.owns()) refuse("another thread runs this plan");
    torchopt::launch(*rule_, Kind::kStep, tensors_, numbers_, maximize_, placement_);
}

py::object StepPlan::advance(const py::list& grads, const py::list& counts,
                             const py::object& hypers, bool maximize, int num_threads,
                             bool launch) {
    if (!can_make_tensors() || counts.size() == 0 || !are_one(counts)) return py::none();
    const std::optional<std::int64_t> count = count_of(PyList_GET_ITEM(counts.ptr(), 0));
    if (!count) return py::none();
    py::object following = make_count(*count + 1);  // allocate before the step, since this may fail
    if (!run(grads, py::int_(*count + 1), hypers, maximize, num_threads, kCpu, 0, launch))
        return py::none();
    return following;
}

bool StepPlan::unmoved(const py::list& role, const std::vector<std::uintptr_t>& expected) {
    if (role.size() != expected.size()) return false;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const std::optional<Dense> x =
            reader_.read_again(PyList_GET_ITEM(role.ptr(), static_cast<Py_ssize_t>(i)));
        if (!x || x->address != expected[i] || x->size != tensors_.sizes[i] ||
            x->dtype != tensors_.dtype || x->device != device_)
            return false;
    }
    return true;
}

bool StepPlan::take_gradients(const py::list& grads) {
    if (grads.size() != tensors_.sizes.size()) return false;
    for (std::size_t i = 0; i < tensors_.sizes.size(); ++i) {
        PyObject* const object = PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i));
        const std::optional<Dense> g = reader_.read(object);
        if (!g || g->size != tensors_.sizes[i] || g->dtype != tensors_.dtype ||
            g->device != device_ || (apart_[i] != g->address && !is_apart(*g, i)))
            return false;
        tensors_.inputs[0][i] = g->address;
    }
    return true;
}

bool StepPlan::is_apart(const Dense& gradient, std::size_t index) {
    if (gradient.size == 0) return true;
    const Span span = span_of(gradient);
    const auto next = std::upper_bound(written_.begin(), written_.end(), span.begin,
                                       [](std::uintptr_t at, const Span& s) { return at < s.end; });
    if (next != written_.end() && next->begin < span.end) return false;
    apart_[index] = gradient.address;
    return true;
}

bool StepPlan::take_step(const py::object& step) {
    tensors_.steps.clear();
    PyObject* const count = step.ptr();
    if (PyLong_Check(count)) {
        tensors_.step = step.cast<std::int64_t>();
        return true;
    }
    if (device_ == kCpu && can_make_tensors()) {
        const std::optional<std::int64_t> value = count_of(count);
        tensors_.step = value.value_or(0);
        return value.has_value();
    }
    // The device reads the step, so nothing waits for the device.
    tensors_.steps.assign(tensors_.sizes.size(), address_of(count));
    return true;
}

}  // namespace torchopt
