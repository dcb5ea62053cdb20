// SPDX-License-Identifier: Apache-2.0
#include "nodes/tuple_classes.h"

#include <structseq.h>

#include <cstring>
#include <string>

#include "support/errors.h"

namespace optree {
namespace {

// The attribute, or null with no error set if reading it raised.
Ref attribute(PyObject* object, const char* name) {
    Ref value = Ref::steal(PyObject_GetAttrString(object, name));
    if (!value) PyErr_Clear();
    return value;
}

Ref global_of(PyObject* globals, const char* name) {
    const Ref key = checked(PyUnicode_InternFromString(name));
    Ref value = Ref::steal(compat::dict_item(globals, key.get()));
    if (!value && PyErr_Occurred()) throw PythonError{};
    return value;
}

bool has_callable(PyTypeObject* type, const char* name) {
    const Ref value = attribute(reinterpret_cast<PyObject*>(type), name);
    return value && PyCallable_Check(value.get()) != 0;
}

}  // namespace

bool is_namedtuple_class(PyTypeObject* type) {
    if (!PyType_FastSubclass(type, Py_TPFLAGS_TUPLE_SUBCLASS)) return false;
    const Ref fields = attribute(reinterpret_cast<PyObject*>(type), "_fields");
    if (!fields || !PyTuple_CheckExact(fields.get())) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(fields.get()); ++i) {
        if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(fields.get(), i))) return false;
    }
    return has_callable(type, "_make") && has_callable(type, "_asdict");
}

bool is_structseq_class(PyTypeObject* type) {
    if (!PyType_FastSubclass(type, Py_TPFLAGS_TUPLE_SUBCLASS)) return false;
    if (PyType_HasFeature(type, Py_TPFLAGS_BASETYPE)) return false;
    if (type->tp_bases == nullptr || !PyTuple_CheckExact(type->tp_bases) ||
        PyTuple_GET_SIZE(type->tp_bases) != 1 ||
        PyTuple_GET_ITEM(type->tp_bases, 0) != reinterpret_cast<PyObject*>(&PyTuple_Type)) {
        return false;
    }
    for (const char* name : {"n_fields", "n_sequence_fields", "n_unnamed_fields"}) {
        const Ref count = attribute(reinterpret_cast<PyObject*>(type), name);
        if (!count || !PyLong_CheckExact(count.get())) return false;
    }
    return true;
}

bool makes_plain_tuple(PyTypeObject* type, std::size_t arity) {
    // `type.__call__` must run, and `object.__init__` must ignore what `__new__` was given.
    if (Py_TYPE(type)->tp_call != PyType_Type.tp_call) return false;
    if (type->tp_init != PyBaseObject_Type.tp_init) return false;
    if (type->tp_itemsize != PyTuple_Type.tp_itemsize || type->tp_alloc != PyType_GenericAlloc) {
        return false;
    }
    Ref constructor = attribute(reinterpret_cast<PyObject*>(type), "__new__");
    if (!constructor || !PyFunction_Check(constructor.get())) return false;
    // The generated `lambda _cls, x, y: _tuple_new(_cls, (x, y))` lives in a namespace of its own
    // whose `_tuple_new` is tuple.__new__ and whose name is "namedtuple_<typename>".
    PyObject* globals = PyFunction_GET_GLOBALS(constructor.get());
    const Ref name = global_of(globals, "__name__");
    const Ref tuple_new = global_of(globals, "_tuple_new");
    if (!name || !tuple_new || !PyUnicode_CheckExact(name.get())) return false;
    const char* text = PyUnicode_AsUTF8(name.get());
    if (text == nullptr) {
        PyErr_Clear();
        return false;
    }
    if (std::strncmp(text, "namedtuple_", 11) != 0) return false;
    const Ref expected = attribute(reinterpret_cast<PyObject*>(&PyTuple_Type), "__new__");
    if (!expected || !equal(expected.get(), tuple_new.get())) return false;
    auto* code = reinterpret_cast<PyCodeObject*>(PyFunction_GET_CODE(constructor.get()));
    if (code->co_argcount != static_cast<int>(arity) + 1 || code->co_kwonlyargcount != 0 ||
        (code->co_flags & (CO_VARARGS | CO_VARKEYWORDS | CO_GENERATOR | CO_COROUTINE)) != 0) {
        return false;
    }
    // One global name only, and no nested code: nothing else can happen in there.
    PyObject* names = code->co_names;
    return PyTuple_GET_SIZE(names) == 1 &&
           PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "_tuple_new") == 0;
}

Ref namedtuple_fields(PyTypeObject* type) {
    Ref fields = checked(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "_fields"));
    if (!PyTuple_Check(fields.get())) {
        raise(PyExc_TypeError, "Expected a collections.namedtuple type, got %R.", type);
    }
    return fields;
}

Ref structseq_fields(PyTypeObject* type) {
    PyObject* object = reinterpret_cast<PyObject*>(type);
    const auto count_of = [object](const char* name) {
        const Ref count = checked(PyObject_GetAttrString(object, name));
        const Py_ssize_t value = PyLong_AsSsize_t(count.get());
        if (value == -1 && PyErr_Occurred()) throw PythonError{};
        return value;
    };
    const Py_ssize_t visible = count_of("n_sequence_fields");
    Ref fields = checked(PyTuple_New(visible));
    // A member stands at the offset of its slot; the unnamed slots have no member.
    const PyMemberDef* member = type->tp_members;
    for (Py_ssize_t i = 0; i < visible; ++i) {
        const auto offset = static_cast<Py_ssize_t>(
            offsetof(PyTupleObject, ob_item) + static_cast<std::size_t>(i) * sizeof(PyObject*));
        const char* name = "unnamed field";
        for (const PyMemberDef* m = member; m != nullptr && m->name != nullptr; ++m) {
            if (m->offset == offset) name = m->name;
        }
        PyTuple_SET_ITEM(fields.get(), i, checked(PyUnicode_InternFromString(name)).release());
    }
    return fields;
}

bool TupleFamily::learn(PyTypeObject* type) {
    // What follows may run Python code, which may drop the class or ask about it again.
    const Ref alive = Ref::borrow(reinterpret_cast<PyObject*>(type));
    const bool member = test_(type);
    if (evict_ == nullptr) return member;
    const auto is_known = [&] {
        const ReaderSection section;
        return classes_.peek().find(type) != nullptr;
    };
    Ref weakref;
    if (PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)) {
        if (is_known()) return member;
        weakref = checked(PyWeakref_NewRef(alive.get(), evict_));
    }
    auto made = std::make_unique<TupleClass>(member, weakref.get());
    const WriterLock writing(lock_);
    if (is_known()) return member;
    classes_.update([&](Classes& classes) { classes.insert(type, made.get()); });
    (void)made.release();  // the table owns it
    (void)weakref.release();
    return member;
}

bool TupleFamily::decide(PyTypeObject* type, std::size_t count, std::uint64_t question) {
    if (count >> 31 != 0) return false;
    (void)contains(type);
    const bool direct = makes_plain_tuple(type, count);
    const ReaderSection section;
    if (TupleClass* known = classes_.peek().find(type)) {
        known->making.store(question | (direct ? 1 : 0), std::memory_order_relaxed);
    }
    return direct;
}

int TupleFamily::traverse(visitproc visit, void* arg) const {
    int status = 0;
    classes_.peek().for_each([&](PyTypeObject*, const TupleClass* entry) {
        if (status == 0 && entry->weakref != nullptr) status = visit(entry->weakref, arg);
    });
    return status;
}

void TupleFamily::evict(PyObject* weakref) noexcept {
    std::unique_ptr<TupleClass> evicted;
    {
        const WriterLock writing(lock_);
        PyTypeObject* type = nullptr;
        classes_.peek().for_each([&](PyTypeObject* cls, TupleClass* entry) {
            if (entry->weakref != weakref) return;
            type = cls;
            evicted.reset(entry);
        });
        if (type == nullptr) return;
        classes_.update([&](Classes& classes) { classes.erase(type); });
    }
    Py_DECREF(weakref);
}

void TupleFamily::clear() noexcept {
    std::unique_ptr<const Classes> dropped;
    {
        const WriterLock writing(lock_);
        dropped = classes_.publish(std::make_unique<Classes>());
    }
    dropped->for_each([](PyTypeObject*, TupleClass* entry) {
        const std::unique_ptr<TupleClass> owner(entry);
        Py_XDECREF(entry->weakref);
    });
}

}  // namespace optree
