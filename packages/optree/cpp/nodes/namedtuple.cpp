// SPDX-License-Identifier: Apache-2.0
#include "nodes/namedtuple.h"

namespace optree {

PyObject* NamedTuple::rebuild(State& state, const Slot* slots, PyObject** children,
                              std::size_t count) {
    auto* type = static_cast<PyTypeObject*>(slots[0]);
    // Creates instances directly if the class would do the same. Makes unflatten 3x to 8x faster on
    // namedtuple trees (benchmarks/optree).
    bool direct = false;
    try {
        direct = state.tuples.makes_directly(type, count);
    } catch (const PythonError&) {
        drop_children(children, count);
        return nullptr;
    }
    if (direct) return steal_into_instance(type, children, count);
    return state.running_python([&] {
        PyObject* made = calling_python(
            [&] { return PyObject_Vectorcall(as_object(slots[0]), children, count, nullptr); });
        drop_children(children, count);
        return made;
    });
}

}  // namespace optree
