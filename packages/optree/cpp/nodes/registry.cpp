// SPDX-License-Identifier: Apache-2.0
#include "nodes/registry.h"

#include <vector>

namespace optree {
namespace {

void registration_dealloc(PyObject* self) {
    auto* registration = reinterpret_cast<Registration*>(self);
    Py_XDECREF(registration->type);
    Py_XDECREF(registration->flatten_func);
    Py_XDECREF(registration->unflatten_func);
    Py_XDECREF(registration->path_entry_type);
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyType_Slot registration_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(registration_dealloc)},
    {0, nullptr},
};

PyType_Spec registration_spec = {
    "optree._C.Registration",
    sizeof(Registration),
    0,
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | compat::kNoInstantiation),
    registration_slots,
};

std::string name_of(PyObject* name) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name, &size);
    if (text != nullptr) return {text, static_cast<std::size_t>(size)};
    // Lone surrogates have no UTF-8 form; take the same bytes for every equal string.
    PyErr_Clear();
    Ref bytes = checked(PyUnicode_AsEncodedString(name, "utf-8", "surrogatepass"));
    return {PyBytes_AS_STRING(bytes.get()),
            static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.get()))};
}

}  // namespace

Ref make_registration_type() {
    return internal_class(checked(PyType_FromSpec(&registration_spec)));
}

Ref make_registration(PyTypeObject* registration_type, PyObject* type, PyObject* flatten_func,
                      PyObject* unflatten_func, PyObject* path_entry_type) {
    Ref self = checked(registration_type->tp_alloc(registration_type, 0));
    auto* registration = reinterpret_cast<Registration*>(self.get());
    registration->type = compat::new_ref(type);
    registration->flatten_func = compat::new_ref(flatten_func);
    registration->unflatten_func = compat::new_ref(unflatten_func);
    registration->path_entry_type = compat::new_ref(path_entry_type);
    return self;
}

Namespace* Registry::find(PyObject* name) {
    if (name == last_name_) return last_;
    if (PyUnicode_GET_LENGTH(name) == 0) return nullptr;
    auto found = named_.find(name_of(name));
    Namespace* result = found == named_.end() ? nullptr : found->second.get();
    PyObject* old = last_name_;
    last_name_ = compat::new_ref(name);
    last_ = result;
    Py_XDECREF(old);
    return result;
}

Namespace& Registry::get(PyObject* name) {
    if (PyUnicode_GET_LENGTH(name) == 0) return global_;
    auto& slot = named_[name_of(name)];
    if (slot == nullptr) {
        slot = std::make_unique<Namespace>();
        PyObject* old = last_name_;
        last_name_ = nullptr;
        last_ = nullptr;
        Py_XDECREF(old);
    }
    return *slot;
}

std::size_t Registry::named_size() const noexcept {
    std::size_t size = 0;
    for (const auto& [name, space] : named_) size += space->types.size();
    return size;
}

void Registry::clear() noexcept {
    // Namespace objects stay (others hold pointers to them); what they own goes.
    std::vector<Registration*> dropped;
    const auto empty = [&dropped](Namespace& space) {
        space.types.for_each([&](PyTypeObject*, Registration* value) { dropped.push_back(value); });
        PointerMap<PyTypeObject, Registration> none;
        space.types.swap(none);
        space.insertion_ordered = false;
    };
    empty(global_);
    for (auto& [name, space] : named_) empty(*space);
    PyObject* old = last_name_;
    last_name_ = nullptr;
    last_ = nullptr;
    Py_XDECREF(old);
    for (Registration* registration : dropped) Py_DECREF(reinterpret_cast<PyObject*>(registration));
}

int Registry::traverse(visitproc visit, void* arg) const {
    // Registrations are not collected themselves: the registry reports their members while it is
    // their only owner, a spec reports them while it is (see walk/gc.cpp).
    int status = 0;
    const auto report = [&](const Namespace& space) {
        space.types.for_each([&](PyTypeObject*, Registration* r) {
            if (Py_REFCNT(reinterpret_cast<PyObject*>(r)) != 1) return;
            for (PyObject* member :
                 {r->type, r->flatten_func, r->unflatten_func, r->path_entry_type}) {
                if (status == 0 && member != nullptr) status = visit(member, arg);
            }
        });
    };
    report(global_);
    for (const auto& [name, space] : named_) report(*space);
    return status;
}

}  // namespace optree
