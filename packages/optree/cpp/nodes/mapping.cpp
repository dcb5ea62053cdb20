// SPDX-License-Identifier: Apache-2.0
#include "nodes/mapping.h"

#include "nodes/sort_keys.h"

namespace optree {
namespace {

// The elements of `keys` that are not in `others` (a dict), as a list.
Ref without(PyObject* keys, PyObject* others) {
    Ref result = checked(PyList_New(0));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(keys); ++i) {
        const Ref key = checked(compat::list_item(keys, i));
        if (!item_of(others, key.get())) check_status(PyList_Append(result.get(), key.get()));
    }
    return result;
}

Ref as_set(PyObject* keys) {
    Ref set = checked(PyDict_New());
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(keys); ++i) {
        const Ref key = checked(compat::list_item(keys, i));
        set_item(set.get(), key.get(), Py_None);
    }
    return set;
}

// Whether the class of `object` belongs to a mapping kind.
bool is_mapping_object(const State& state, PyObject* object) noexcept {
    for (const KindFacts& kind : kinds::facts) {
        if (kind.keys >= 0 && type_object(Py_TYPE(object)) == state.classes[kind.value].get()) {
            return true;
        }
    }
    return false;
}

// "dict, collections.OrderedDict, or collections.defaultdict": the classes that every Python has
// come first.
Ref mapping_names(const State& state) {
    ObjectStack names;
    for (const bool builtin : {true, false}) {
        for (const KindFacts& kind : kinds::facts) {
            PyObject* cls = state.classes[kind.value].get();
            if (kind.keys < 0 || cls == nullptr) continue;
            const Ref module = attribute_of(cls, "__module__");
            const Ref name = attribute_of(cls, "__name__");
            const int order = PyUnicode_CompareWithASCIIString(module.get(), "builtins");
            if ((order == 0) != builtin) continue;
            names.push_owned(builtin ? compat::new_ref(name.get())
                                     : formatted("%U.%U", module.get(), name.get()).release());
        }
    }
    Ref text = checked(PyUnicode_FromString(""));
    for (std::size_t i = 0; i < names.size(); ++i) {
        const char* before = i == 0 ? "" : i + 1 < names.size() ? ", " : ", or ";
        text = formatted("%U%s%U", text.get(), before, names[i]);
    }
    return text;
}

}  // namespace

void raise_expected(const char* what, PyObject* got) {
    raise(PyExc_ValueError, "Expected an instance of %s, got %R.", what, got);
}

void raise_arity(const char* kind, const char* label, std::uint32_t expected, Py_ssize_t got,
                 PyObject* object) {
    raise(PyExc_ValueError, "%s arity mismatch; expected: %zd, got: %zd; %s: %R.", kind,
          static_cast<Py_ssize_t>(expected), got, label, object);
}

void raise_key_mismatch(PyObject* expected, PyObject* got, PyObject* suffix) {
    const Ref missing = without(expected, as_set(got).get());
    const Ref extra = without(got, as_set(expected).get());
    const Ref got_sorted = sorted_list(got);
    Ref message = formatted("dictionary key mismatch; expected key(s): %R, got key(s): %R",
                            expected, got_sorted.get());
    if (PyList_GET_SIZE(missing.get()) != 0) {
        const Ref keys = sorted_list(missing.get());
        message = formatted("%U, missing key(s): %R", message.get(), keys.get());
    }
    if (PyList_GET_SIZE(extra.get()) != 0) {
        const Ref keys = sorted_list(extra.get());
        message = formatted("%U, extra key(s): %R", message.get(), keys.get());
    }
    message = formatted("%U%U", message.get(), suffix);
    PyErr_SetObject(PyExc_ValueError, message.get());
    throw PythonError{};
}

void match_mapping(Context& context, const KeyLayout* layout, const char* label, PyObject* object,
                   ObjectStack& children) {
    if (!PyDict_CheckExact(object) && !is_mapping_object(context.state, object)) {
        raise(PyExc_ValueError, "Expected an instance of %U, got %R.",
              mapping_names(context.state).get(), object);
    }
    const std::size_t base = children.size();
    if (PyDict_GET_SIZE(object) == static_cast<Py_ssize_t>(layout->size)) {
        // Equal keys inserted in the same order are matched in one scan.
        if (push_known_values(layout, object, children)) return;
        std::uint32_t i = 0;
        for (; i < layout->size; ++i) {
            Ref value = item_of(object, layout->keys[i]);
            if (!value) break;
            children.push_owned(value.release());
        }
        if (i == layout->size) return;
        children.drop_from(base);
    }
    const Ref expected = layout_keys(layout);
    const Ref got = checked(PySequence_List(object));
    const Ref suffix = formatted("; %s: %R.", label, object);
    raise_key_mismatch(expected.get(), got.get(), suffix.get());
}

}  // namespace optree
