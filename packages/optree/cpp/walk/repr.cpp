// SPDX-License-Identifier: Apache-2.0
#include "walk/repr.h"

#include <string>

namespace optree {
namespace {

// Writes from the last character to the first, in the order in which the table is read, and writes
// the text of each node once. Joining the texts of the children at every level takes time quadratic
// in the depth.
std::string body(const Tree& tree) {
    if (tree.nodes.empty()) return "*";
    constexpr char hole = '\xff';  // a byte that does not occur in UTF-8
    std::string reversed;
    Texts open;  // rest of the nodes on the path from the root, a hole for each child
    Cursor cursor = Cursor::end_of(tree);
    const auto enter = [&](const Node& node) {
        open.push_back(
            node_text(node.kind, slots_of(tree, node), Texts(node.arity, std::string(1, hole))));
        cursor.enter();
    };
    enter(tree.root());
    while (!open.empty()) {
        std::string& text = open.back();
        const std::size_t at = text.rfind(hole);
        const std::size_t rest = at == std::string::npos ? 0 : at + 1;
        reversed.append(text.rbegin(), text.rend() - static_cast<std::ptrdiff_t>(rest));
        if (at == std::string::npos) {
            open.pop_back();
            continue;
        }
        text.resize(at);
        if (const Node* node = cursor.node()) {
            enter(*node);
        } else {
            reversed += '*';
            cursor.leaf();
        }
    }
    return {reversed.rbegin(), reversed.rend()};
}

// Marks a spec as being printed by this thread: a key may hold the spec again.
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
        // Py_ReprLeave preserves the exception that is set.
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
    check_stack();
    if (guard.nested()) return checked(PyUnicode_FromString("..."));
    if (!is_initialised(spec)) return checked(PyUnicode_FromString("<uninitialised PyTreeSpec>"));
    std::string text = "PyTreeSpec(" + body(spec.tree);
    if (spec.none_is_leaf) text += ", NoneIsLeaf";
    if (!is_empty_str(spec.name)) text += ", namespace=" + repr_of(spec.name);
    text += ")";
    return checked(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogatepass"));
}

}  // namespace optree
