// SPDX-License-Identifier: Apache-2.0
#include "walk/repr.h"

#include <string>
#include <vector>

namespace optree {
namespace {

std::string body(const SpecObject& spec) {
    Texts stack;
    std::uint32_t taken = 0;
    for (const Node& node : spec.tree.nodes) {
        for (; taken < node.leaf_end; ++taken) stack.emplace_back("*");
        const auto first = stack.end() - node.arity;
        const Texts children(std::make_move_iterator(first), std::make_move_iterator(stack.end()));
        stack.erase(first, stack.end());
        stack.push_back(node_text(node.kind, slots_of(spec.tree, node), children));
    }
    return spec.tree.nodes.empty() ? "*" : stack.back();
}

// Marks a spec as being printed on this thread: a key may hold the spec again.
class ReprGuard {
  public:
    explicit ReprGuard(PyObject* object) : object_(object) {
        const int status = Py_ReprEnter(object);
        check_status(status);
        nested_ = status != 0;
    }
    ReprGuard(const ReprGuard&) = delete;
    ReprGuard& operator=(const ReprGuard&) = delete;
    ~ReprGuard() {
        if (nested_) return;
        // Py_ReprLeave keeps the error that is set.
        Py_ReprLeave(object_);
    }
    bool nested() const noexcept { return nested_; }

  private:
    PyObject* object_;
    bool nested_ = false;
};

}  // namespace

Ref spec_repr(const SpecObject& spec) {
    const ReprGuard guard(reinterpret_cast<PyObject*>(const_cast<SpecObject*>(&spec)));
    if (guard.nested()) return checked(PyUnicode_FromString("..."));
    if (!is_initialised(spec)) return checked(PyUnicode_FromString("<uninitialised PyTreeSpec>"));
    std::string text = "PyTreeSpec(" + body(spec);
    if (spec.none_is_leaf) text += ", NoneIsLeaf";
    if (!is_empty_str(spec.name)) text += ", namespace=" + repr_of(spec.name);
    text += ")";
    return checked(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogatepass"));
}

}  // namespace optree
