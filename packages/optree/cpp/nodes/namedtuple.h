// SPDX-License-Identifier: Apache-2.0
// Named tuples. The slot is the class.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct NamedTuple : RecordKind<NamedTuple> {
    static constexpr const char* kName = "namedtuple";
    static constexpr const char* kFamily = "collections.namedtuple";
    static constexpr const char* kEntryClass = "NamedTupleEntry";
    static constexpr bool kRebuildsQuietly = true;
    static bool is_class(State& state, PyTypeObject* type) {
        return state.tuples.is_namedtuple(type);
    }
    static Ref fields(PyTypeObject* type) { return namedtuple_fields(type); }
    static std::string class_text(PyObject* type) { return attribute_text(type, "__name__"); }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children,
                             std::size_t count);
};

}  // namespace optree
