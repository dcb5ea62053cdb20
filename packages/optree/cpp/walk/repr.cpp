// SPDX-License-Identifier: Apache-2.0
#include "walk/repr.h"

#include <string>
#include <vector>

namespace optree {
namespace {

// Text in UTF-8; lone surrogates are kept the way Python's surrogatepass does.
std::string utf8(PyObject* text) {
    if (PyUnicode_IS_COMPACT_ASCII(text)) {  // 1.2x of repr (benchmarks/optree)
        return {static_cast<const char*>(PyUnicode_DATA(text)),
                static_cast<std::size_t>(PyUnicode_GET_LENGTH(text))};
    }
    const Ref bytes = checked(PyUnicode_AsEncodedString(text, "utf-8", "surrogatepass"));
    return {PyBytes_AS_STRING(bytes.get()),
            static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.get()))};
}

std::string repr_of(PyObject* object) { return utf8(checked(PyObject_Repr(object)).get()); }

std::string attribute_text(PyObject* object, const char* name) {
    const Ref value = checked(PyObject_GetAttrString(object, name));
    return utf8(checked(PyObject_Str(value.get())).get());
}

using Children = std::vector<std::string>;

std::string joined(const Children& children) {
    std::string text;
    for (std::size_t i = 0; i < children.size(); ++i) {
        if (i != 0) text += ", ";
        text += children[i];
    }
    return text;
}

std::string braces(const KeyLayout* layout, const Children& children) {
    std::string text = "{";
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        if (i != 0) text += ", ";
        text += repr_of(layout->keys[i]) + ": " + children[i];
    }
    return text + "}";
}

std::string with_fields(const std::string& name, PyObject* fields, const Children& children) {
    if (static_cast<std::size_t>(PyTuple_GET_SIZE(fields)) != children.size()) {
        raise(PyExc_ValueError, "The number of fields (%zd) of %s does not match the arity (%zd).",
              PyTuple_GET_SIZE(fields), name.c_str(), static_cast<Py_ssize_t>(children.size()));
    }
    std::string text = name + "(";
    for (std::size_t i = 0; i < children.size(); ++i) {
        if (i != 0) text += ", ";
        const std::string field = utf8(PyTuple_GET_ITEM(fields, static_cast<Py_ssize_t>(i)));
        text += field == "unnamed field" ? "<unnamed@" + std::to_string(i) + ">" : field;
        text += "=" + children[i];
    }
    return text + ")";
}

std::string structseq_name(PyObject* type) {
    const Ref module = Ref::steal(PyObject_GetAttrString(type, "__module__"));
    if (!module) PyErr_Clear();
    const std::string prefix =
        module && PyUnicode_Check(module.get()) ? utf8(module.get()) : std::string();
    const std::string name = attribute_text(type, "__qualname__");
    if (prefix.empty() || prefix == "__main__" || prefix == "builtins" ||
        prefix == "__builtins__") {
        return name;
    }
    return prefix + "." + name;
}

std::string node_text(Kind kind, const Slot* slots, const Children& children) {
    switch (kind) {
        case Kind::none: return "None";
        case Kind::tuple: return "(" + joined(children) + (children.size() == 1 ? ",)" : ")");
        case Kind::list: return "[" + joined(children) + "]";
        case Kind::dict: return braces(as_layout(slots[0]), children);
        case Kind::ordereddict:
            return children.empty() ? "OrderedDict()"
                                    : "OrderedDict(" + braces(as_layout(slots[0]), children) + ")";
        case Kind::frozendict:
            return children.empty() ? "frozendict()"
                                    : "frozendict(" + braces(as_layout(slots[0]), children) + ")";
        case Kind::defaultdict:
            return "defaultdict(" + repr_of(as_object(slots[1])) + ", " +
                   braces(as_layout(slots[0]), children) + ")";
        case Kind::deque: {
            std::string text = "deque(";
            if (!children.empty()) text += "[" + joined(children) + "]";
            if (slots[0] != nullptr) {
                if (!children.empty()) text += ", ";
                text += "maxlen=" + repr_of(as_object(slots[0]));
            }
            return text + ")";
        }
        case Kind::namedtuple: {
            PyObject* type = as_object(slots[0]);
            const Ref fields = namedtuple_fields(reinterpret_cast<PyTypeObject*>(type));
            return with_fields(attribute_text(type, "__name__"), fields.get(), children);
        }
        case Kind::structseq: {
            PyObject* type = as_object(slots[0]);
            const Ref fields = structseq_fields(reinterpret_cast<PyTypeObject*>(type));
            return with_fields(structseq_name(type), fields.get(), children);
        }
        case Kind::custom:
            return "CustomTreeNode(" + attribute_text(as_registration(slots[0])->type, "__name__") +
                   "[" + repr_of(as_object(slots[1])) + "], [" + joined(children) + "])";
        case Kind::leaf: break;
    }
    throw std::logic_error("not the kind of an internal node");
}

std::string body(const SpecObject& spec) {
    Children stack;
    std::uint32_t taken = 0;
    for (const Node& node : spec.tree.nodes) {
        for (; taken < node.leaf_end; ++taken) stack.emplace_back("*");
        const auto first = stack.end() - node.arity;
        Children children(std::make_move_iterator(first), std::make_move_iterator(stack.end()));
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
