// SPDX-License-Identifier: Apache-2.0
#include "nodes/registry.h"

#include "nodes/attributes.h"
#include "support/errors.h"

namespace optree {
namespace {

int registration_traverse(PyObject* self, visitproc visit, void* arg) {
    const auto* registration = reinterpret_cast<Registration*>(self);
    OPTREE_VISIT_TYPE(self);
    for (PyObject* member : {registration->type, registration->flatten_func,
                             registration->unflatten_func, registration->path_entry_type}) {
        Py_VISIT(member);
    }
    return registration->attributes != nullptr ? registration->attributes->traverse(visit, arg) : 0;
}

void registration_dealloc(PyObject* self) {
    PyObject_GC_UnTrack(self);
    auto* registration = reinterpret_cast<Registration*>(self);
    Py_XDECREF(registration->type);
    Py_XDECREF(registration->flatten_func);
    Py_XDECREF(registration->unflatten_func);
    Py_XDECREF(registration->path_entry_type);
    delete registration->attributes;
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyType_Slot registration_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(registration_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(registration_traverse)},
    {0, nullptr},
};

PyType_Spec registration_spec = {
    "optree._C.Registration",
    sizeof(Registration),
    0,
    // No tp_clear: it never changes, so every cycle through it contains another object that can be
    // cleared.
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | compat::kNoInstantiation),
    registration_slots,
};

// The hash of an exact str, which caches it.
Py_hash_t hash_of(PyObject* name) {
    const Py_hash_t hash = PyObject_Hash(name);
    if (hash == -1) throw PythonError{};
    return hash;
}

Namespace* find_in(const NamespaceTable& table, PyObject* name, Py_hash_t hash) noexcept {
    for (auto [place, end] = table.equal_range(hash); place != end; ++place) {
        PyObject* known = place->second->name.get();
        if (known == name || PyUnicode_Compare(known, name) == 0) return place->second;
    }
    return nullptr;
}

}  // namespace

Ref make_registration_type() {
    return internal_class(checked(PyType_FromSpec(&registration_spec)));
}

Ref make_registration(PyTypeObject* registration_type, PyObject* type, PyObject* flatten_func,
                      PyObject* unflatten_func, PyObject* path_entry_type,
                      std::unique_ptr<Attributes> attributes) {
    Ref self = checked(registration_type->tp_alloc(registration_type, 0));
    auto* registration = reinterpret_cast<Registration*>(self.get());
    registration->type = compat::new_ref(type);
    registration->flatten_func = compat::new_ref(flatten_func);
    registration->unflatten_func = compat::new_ref(unflatten_func);
    registration->path_entry_type = compat::new_ref(path_entry_type);
    registration->attributes = attributes.release();
    return self;
}

Registry::~Registry() {
    clear();
    for (Namespace* space = newest_; space != nullptr;) delete std::exchange(space, space->next);
}

Namespace* Registry::find(PyObject* name) {
    if (!compat::kFreeThreaded && name == last_name_) return last_;
    if (PyUnicode_GET_LENGTH(name) == 0) return nullptr;
    const Py_hash_t hash = hash_of(name);
    Namespace* found = nullptr;
    {
        const ReaderSection section;
        found = find_in(named_.peek(), name, hash);
    }
    if (!compat::kFreeThreaded) {
        PyObject* old = last_name_;
        last_name_ = compat::new_ref(name);
        last_ = found;
        Py_XDECREF(old);
    }
    return found;
}

Namespace& Registry::get(PyObject* name) {
    if (PyUnicode_GET_LENGTH(name) == 0) return global_;
    if (Namespace* found = find(name)) return *found;
    const Py_hash_t hash = hash_of(name);
    auto made = std::make_unique<Namespace>();
    // Most callers pass a literal, which is found by identity.
    PyObject* interned = compat::new_ref(name);
    PyUnicode_InternInPlace(&interned);
    made->name = Ref::steal(interned);
    forget_last_name();
    const WriterLock writing(lock_);
    if (Namespace* found = find_in(named_.peek(), name, hash)) return *found;
    named_.update([&](NamespaceTable& table) { table.emplace(hash, made.get()); });
    made->next = newest_;
    newest_ = made.get();
    return *made.release();
}

bool Registry::add(Namespace& space, PyTypeObject* type, const Ref& registration) {
    const WriterLock writing(lock_);
    if (space.types.peek().find(type) != nullptr) return false;
    space.types.update(
        [&](Namespace::Types& types) { types.insert(type, as_registration(registration.get())); });
    ++version_;
    Py_INCREF(registration.get());
    return true;
}

Ref Registry::remove(Namespace& space, PyTypeObject* type) {
    const WriterLock writing(lock_);
    Registration* found = space.types.peek().find(type);
    if (found == nullptr) return nullptr;
    space.types.update([&](Namespace::Types& types) { types.erase(type); });
    ++version_;
    return Ref::steal(reinterpret_cast<PyObject*>(found));
}

std::size_t Registry::named_size() const noexcept {
    std::size_t size = 0;
    for_each_named([&](const Namespace& space) { size += space.size(); });
    return size;
}

void Registry::forget_last_name() noexcept {
    PyObject* old = last_name_;
    last_name_ = nullptr;
    last_ = nullptr;
    Py_XDECREF(old);
}

void Registry::clear() noexcept {
    // Namespaces stay alive, since others hold pointers to them. Their content is freed.
    const auto empty = [this](Namespace& space) {
        std::unique_ptr<Namespace::Types> dropped;
        {
            const WriterLock writing(lock_);
            dropped = space.types.take();
            space.insertion_ordered.store(false, std::memory_order_relaxed);
            ++version_;
        }
        if (!dropped) return;
        dropped->for_each([](PyTypeObject*, Registration* registration) {
            drop(reinterpret_cast<PyObject*>(registration));
        });
    };
    empty(global_);
    for_each_named(empty);
    forget_last_name();
}

int Registry::traverse(visitproc visit, void* arg) const {
    int status = 0;
    const auto report = [&](const Namespace& space) {
        space.types.peek().for_each([&](PyTypeObject*, Registration* registration) {
            if (status == 0) status = visit(reinterpret_cast<PyObject*>(registration), arg);
        });
    };
    report(global_);
    for_each_named(report);
    return status;
}

}  // namespace optree
