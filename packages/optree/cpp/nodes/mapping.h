// SPDX-License-Identifier: Apache-2.0
// Shared by dict, OrderedDict and defaultdict, which match each other.
#pragma once

#include "nodes/layout.h"
#include "nodes/sequence.h"

namespace optree {

// Whether the exact class of `object` is one of the mapping kinds.
inline bool is_mapping_object(const State& state, PyObject* object) noexcept {
    return PyDict_CheckExact(object) || Py_TYPE(object) == &PyODict_Type ||
           type_object(Py_TYPE(object)) == state.defaultdict_type.get();
}

// Pushes the values of `object` by the keys of `layout`, or raises what does not match.
// `label` names the kind of the spec's node in the message.
void match_mapping(Context& context, const KeyLayout* layout, const char* label, PyObject* object,
                   ObjectStack& children);

// "dictionary key mismatch; expected key(s): ..." for two lists of keys; `suffix` ends the message.
[[noreturn]] OPTREE_COLD void raise_key_mismatch(PyObject* expected, PyObject* got,
                                                 PyObject* suffix);

}  // namespace optree
