// SPDX-License-Identifier: Apache-2.0
// Shared by dict, OrderedDict and defaultdict, which match each other.
#pragma once

#include "nodes/layout.h"
#include "nodes/look_ahead.h"
#include "nodes/sequence.h"

namespace optree {

// Whether the exact class of `object` is one of the mapping kinds.
inline bool is_mapping_object(const State& state, PyObject* object) noexcept {
    return PyDict_CheckExact(object) || Py_TYPE(object) == &PyODict_Type ||
           type_object(Py_TYPE(object)) == state.defaultdict_type.get();
}

// The key layout of a Dict or an OrderedDict, with the values pushed in traversal order. A mapping
// kind has two ways to it: `gather_known` finds the layout of keys met before and runs no Python code,
// `scan_unknown` makes one.
template <class Mapping>
Ref scan_mapping(Context& context, PyObject* object, ObjectStack& values) {
    {
        const CriticalSection reading(object);  // while values are borrowed
        if (Mapping::is_empty(context.state, object)) {
            return Ref::borrow(context.state.layouts().empty.get());
        }
        const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(object));
        values.reserve(size);
        PyObject** out = values.data() + values.size();
        if (KeyLayout* known = Mapping::gather_known(context, object, out)) {
            take_references(out, size);
            values.adopt(size);
            return Ref::borrow(reinterpret_cast<PyObject*>(known));
        }
    }
    return Mapping::scan_unknown(context, object, values);
}

// Pushes the values of `object` by the keys of `layout`, or raises what does not match.
// `label` names the kind of the spec's node in the message.
void match_mapping(Context& context, const KeyLayout* layout, const char* label, PyObject* object,
                   ObjectStack& children);

// "dictionary key mismatch; expected key(s): ..." for two lists of keys; `suffix` ends the message.
[[noreturn]] OPTREE_COLD void raise_key_mismatch(PyObject* expected, PyObject* got,
                                                 PyObject* suffix);

}  // namespace optree
