// SPDX-License-Identifier: Apache-2.0
#include "walk/repr.h"

#include <cstring>
#include <string>
#include <string_view>

namespace optree {
namespace {

// Text that is written from its end to its beginning.
class Backwards {
  public:
    void write(std::string_view text) {
        if (text.size() > free_) grow(text.size());
        free_ -= text.size();
        std::memcpy(buffer_.data() + free_, text.data(), text.size());
    }
    std::string text() const { return buffer_.substr(free_); }

  private:
    void grow(std::size_t needed) {
        const std::size_t used = buffer_.size() - free_;
        std::string grown(2 * buffer_.size() + needed, ' ');
        std::memcpy(grown.data() + grown.size() - used, buffer_.data() + free_, used);
        free_ = grown.size() - used;
        buffer_.swap(grown);
    }

    std::string buffer_;
    std::size_t free_ = 0;  // the number of bytes before the text
};

// Writes the text of each node once, in the order in which the table is read: the last child comes
// first. Joining the texts of the children at every level takes time quadratic in the depth.
std::string body(const Tree& tree) {
    if (tree.nodes.empty()) return "*";
    constexpr char hole = '\xff';  // a byte that does not occur in UTF-8
    Backwards written;
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
        written.write(std::string_view(text).substr(rest));
        if (at == std::string::npos) {
            open.pop_back();
            continue;
        }
        text.resize(at);
        if (const Node* node = cursor.node()) {
            enter(*node);
        } else {
            written.write("*");
            cursor.leaf();
        }
    }
    return written.text();
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
