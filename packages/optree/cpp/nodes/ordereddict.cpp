// SPDX-License-Identifier: Apache-2.0
#include "nodes/ordereddict.h"

namespace optree {

Ref OrderedDict::scan_unknown(Context& context, PyObject* object, ObjectStack& children) {
    ObjectStack keys;
    ObjectStack values;
    const CriticalSection reading(object);
    const Ref iterator = iterator_of(object);
    while (Ref key = next_of(iterator.get())) {
        Ref value = item_of(object, key.get());
        if (!value) {
            PyErr_SetObject(PyExc_KeyError, key.get());
            throw PythonError{};
        }
        keys.push_owned(key.release());
        values.push_owned(value.release());
    }
    LayoutCache& cache = context.state.layouts();
    Ref layout = Ref::borrow(reinterpret_cast<PyObject*>(cache.find(keys.data(), keys.size())));
    if (!layout) {
        layout = make_layout(context.state.layout(), keys.data(), keys.size(), false);
        cache.offer(as_layout(layout.get()));
    }
    children.reserve(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) children.push_unchecked(values[i]);
    return layout;
}

}  // namespace optree
