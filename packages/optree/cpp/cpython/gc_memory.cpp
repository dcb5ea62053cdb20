// SPDX-License-Identifier: Apache-2.0
#include "cpython/gc_memory.h"

#include "cpython/type_slots.h"

namespace optree {
namespace {

struct Plain {
    PyObject_HEAD
};

void plain_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    type->tp_free(self);
    Py_DECREF(type);
}

int plain_traverse(PyObject* self, visitproc visit, void* arg) {
    OPTREE_VISIT_TYPE(self);
    return 0;
}

PyType_Slot plain_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(plain_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(plain_traverse)},
    {0, nullptr},
};

PyType_Spec plain_spec = {"optree._C.Plain", sizeof(Plain), 0,
                          static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC),
                          plain_slots};

}  // namespace

// Whether an object created in the memory of a dead one behaves like a new one.
bool try_gc_memory() {
    if constexpr (!kKeepsObjects) return false;
    const Owned cls = must(PyType_FromSpec(&plain_spec));
    auto* type = reinterpret_cast<PyTypeObject*>(cls.get());
    PyObject* object = must(type->tp_alloc(type, 0)).release();
    PyObject_GC_UnTrack(object);
    Py_SET_REFCNT(object, 0);
    Py_DECREF(cls.get());  // the reference that the object held
    const Owned again = must(PyObject_Init(object, type));
    if (Py_REFCNT(again.get()) != 1 || PyObject_GC_IsTracked(again.get()) != 0) return false;
    PyObject_GC_Track(again.get());
    return PyObject_GC_IsTracked(again.get()) == 1 && Py_TYPE(again.get()) == type;
}

}  // namespace optree
