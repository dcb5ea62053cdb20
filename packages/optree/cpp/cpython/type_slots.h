// SPDX-License-Identifier: Apache-2.0
// Facts about classes: whether a class still creates its instances as it did before, and the
// offsets of the attributes in an instance.
#pragma once

#include "cpython/trials.h"

#define OPTREE_VISIT_TYPE(self) Py_VISIT(Py_TYPE(self))

namespace optree {
namespace compat {

#if PY_VERSION_HEX >= 0x030A0000
inline constexpr unsigned long kImmutableType = Py_TPFLAGS_IMMUTABLETYPE;
inline constexpr unsigned long kNoInstantiation = Py_TPFLAGS_DISALLOW_INSTANTIATION;
inline void forbid_instances(PyTypeObject*) noexcept {}
#else
inline constexpr unsigned long kImmutableType = 0;
inline constexpr unsigned long kNoInstantiation = 0;
// Does what the flag does in versions that have it.
inline void forbid_instances(PyTypeObject* type) noexcept { type->tp_new = nullptr; }
#endif

// The version tag of the type, which changes whenever the type or a base is modified; 0 means
// unknown.
OPTREE_INLINE unsigned int type_version([[maybe_unused]] PyTypeObject* type) noexcept {
#if defined(PYPY_VERSION)
    return 0;
#elif defined(Py_GIL_DISABLED)
    const unsigned int tag = _Py_atomic_load_uint_relaxed(&type->tp_version_tag);
    if (tag != 0) return tag;
    PyUnstable_Type_AssignVersionTag(type);
    return _Py_atomic_load_uint_relaxed(&type->tp_version_tag);
#elif PY_VERSION_HEX >= 0x030C0000
    if (type->tp_version_tag == 0) PyUnstable_Type_AssignVersionTag(type);
    return type->tp_version_tag;
#else
    return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
#endif
}

// Sets an attribute of a class that Python code cannot modify, or bypasses its metaclass, before
// the class is visible.
inline int set_class_attribute(PyTypeObject* type, const char* name, PyObject* value) noexcept {
    const int status = PyDict_SetItemString(type->tp_dict, name, value);
    PyType_Modified(type);
    return status;
}

}  // namespace compat

// Whether calling an instance of this metaclass runs `__new__` and `__init__` as usual.
OPTREE_INLINE bool calls_plainly(const PyTypeObject* meta) noexcept {
    return meta == &PyType_Type || meta->tp_call == PyType_Type.tp_call;
}

// Whether `type.__call__` runs and calls `__new__` as usual, and `object.__init__` ignores the
// arguments of `__new__`.
OPTREE_INLINE bool calls_only_new(const PyTypeObject* type) noexcept {
    const PyTypeObject* meta = Py_TYPE(type);
    return (meta == &PyType_Type || (meta->tp_call == PyType_Type.tp_call &&
                                     meta->tp_getattro == PyType_Type.tp_getattro)) &&
           type->tp_init == PyBaseObject_Type.tp_init;
}

// Whether instances of a tuple subclass have the layout of a tuple. A class never changes this.
inline bool is_laid_out_as_tuple(const PyTypeObject* type) noexcept {
    return type->tp_alloc == PyType_GenericAlloc && type->tp_itemsize == PyTuple_Type.tp_itemsize;
}

// The offset of a slot's attribute in an instance, given its descriptor; -1 if it is not such a
// slot.
inline Py_ssize_t offset_of_slot(PyObject* descriptor) noexcept {
    if (Py_TYPE(descriptor) != &PyMemberDescr_Type) return -1;
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor)->d_member;
    return member->type == T_OBJECT_EX ? member->offset : -1;
}

}  // namespace optree
