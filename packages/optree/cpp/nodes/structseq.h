// SPDX-License-Identifier: Apache-2.0
// PyStructSequence, the named tuples of C code. Only visible fields count; the slot is the class.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct StructSeq : RecordKind<StructSeq> {
    static constexpr const char* kName = "PyStructSequence";
    static constexpr const char* kFamily = "PyStructSequence type";
    static constexpr const char* kEntryClass = "StructSequenceEntry";
    static bool is_class(State& state, PyTypeObject* type) {
        return state.tuples.is_structseq(type);
    }
    static Ref fields(PyTypeObject* type) { return structseq_fields(type); }
    static std::string class_text(PyObject* type) {
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
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t count) {
        PyObject* items = steal_into_tuple(children, count);
        if (items == nullptr) return nullptr;
        PyObject* made = PyObject_CallOneArg(as_object(slots[0]), items);
        drop(items);
        return made;
    }
};

}  // namespace optree
