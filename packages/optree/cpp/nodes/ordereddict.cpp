// SPDX-License-Identifier: Apache-2.0
#include "nodes/ordereddict.h"

#include "nodes/gather.h"

namespace optree {

// A layout found by the order of the dict underneath is right if the list agrees with it.
KeyLayout* OrderedDict::gather_known(Context& context, PyObject* object, PyObject** out) {
    if (OPTREE_UNLIKELY(!odict_list_is_readable() || PyDict_GET_SIZE(object) == 0 ||
                        !only_grew(object))) {
        return nullptr;
    }
    KeyLayout* known = optree::gather_known(context.state.layouts(), object, false, out);
    const bool agrees = known != nullptr && odict_has(object, known->inserted, known->size);
    return OPTREE_LIKELY(agrees) ? known : nullptr;
}

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
