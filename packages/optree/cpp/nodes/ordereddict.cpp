// SPDX-License-Identifier: Apache-2.0
#include "nodes/ordereddict.h"

namespace optree {

Ref OrderedDict::scan_unknown(Context& context, PyObject* object, ObjectStack& children) {
    const CriticalSection reading(object);
    ObjectStack keys;
    ObjectStack values;
    const Ref iterator = checked(PyObject_GetIter(object));
    while (PyObject* key = PyIter_Next(iterator.get())) {
        keys.push_owned(key);
        PyObject* value = compat::dict_item(object, key);
        if (value == nullptr) {
            if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
            throw PythonError{};
        }
        values.push_owned(value);
    }
    if (PyErr_Occurred()) throw PythonError{};
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
