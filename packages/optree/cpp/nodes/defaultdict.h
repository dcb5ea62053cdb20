// SPDX-License-Identifier: Apache-2.0
// collections.defaultdict. The slots are the default factory and the key layout.
#pragma once

#include "nodes/dict.h"

namespace optree {

struct DefaultDict : DictKind<DefaultDict> {
    static constexpr const char* kName = "defaultdict";
    static Ref find_class() {
        Ref cls = attribute_of_module("collections", "defaultdict");
        const bool is_dict = PyType_Check(cls.get()) &&
                             PyType_FastSubclass(reinterpret_cast<PyTypeObject*>(cls.get()),
                                                 Py_TPFLAGS_DICT_SUBCLASS);
        if (!is_dict) {  // a program may have replaced it
            raise(PyExc_TypeError, "expected collections.defaultdict to be a dict class, got %R",
                  cls.get());
        }
        return cls;
    }
    template <class Visitor>
    static std::uint32_t visit(Context& context, PyObject* object, Visitor& visitor, Ref* slots) {
        slots[0] = attribute_of(object, context.state.str_default_factory.get());
        return MappingKind::visit(context, object, visitor, slots);
    }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children, std::size_t) {
        PyObject* made = PyObject_CallOneArg(state.class_of<DefaultDict>(), as_object(slots[0]));
        return fill_mapping<PyDict_SetItem>(made, keys(slots), children);
    }
    static std::string text(const Slot* slots, const Texts& children) {
        return "defaultdict(" + repr_of(as_object(slots[0])) + ", " +
               braces(keys(slots), children) + ")";
    }
};

}  // namespace optree
