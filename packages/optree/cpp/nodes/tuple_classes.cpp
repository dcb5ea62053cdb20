// SPDX-License-Identifier: Apache-2.0
#include "nodes/tuple_classes.h"

#include <structseq.h>

#include <stdexcept>
#include <string>

#include "cpython/code.h"
#include "cpython/dict_table.h"
#include "cpython/tuple_items.h"
#include "cpython/type_slots.h"
#include "support/errors.h"
#include "support/object_stack.h"

namespace optree {
namespace {

// The attribute, or null without an exception if reading it raised.
Ref attribute(PyObject* object, PyObject* name) {
    Ref value = Ref::steal(calling_python([&] { return PyObject_GetAttr(object, name); }));
    if (!value) PyErr_Clear();
    return value;
}
Ref attribute(PyObject* object, const char* name) {
    return attribute(object, checked(PyUnicode_InternFromString(name)).get());
}

Ref global_of(PyObject* globals, const char* name) {
    return item_of(globals, checked(PyUnicode_InternFromString(name)).get());
}

bool has_callable(PyTypeObject* type, const char* name) {
    const Ref value = attribute(reinterpret_cast<PyObject*>(type), name);
    return value && PyCallable_Check(value.get()) != 0;
}

// Whether it is a tuple subclass with callable `_make` and `_asdict` whose `_fields` is an exact
// tuple of exact str.
bool is_namedtuple_class(PyTypeObject* type) {
    const Ref fields = attribute(reinterpret_cast<PyObject*>(type), "_fields");
    if (!fields || !PyTuple_CheckExact(fields.get())) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(fields.get()); ++i) {
        if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(fields.get(), i))) return false;
    }
    return has_callable(type, "_make") && has_callable(type, "_asdict");
}

// Whether the class has the form that PyStructSequence gives it: final, directly derived from
// tuple, with field counts.
bool is_structseq_class(PyTypeObject* type) {
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

TupleSort sort_by_attributes(PyTypeObject* type) {
    if (!PyType_FastSubclass(type, Py_TPFLAGS_TUPLE_SUBCLASS)) return TupleSort::other;
    return is_structseq_class(type)    ? TupleSort::structseq
           : is_namedtuple_class(type) ? TupleSort::namedtuple
                                       : TupleSort::other;
}

// The code of the `__new__` that collections.namedtuple generates for `arity` fields.
Ref generated_code(std::size_t arity) {
    std::string parameters = "_cls";
    std::string items;
    for (std::size_t i = 0; i < arity; ++i) {
        const std::string name = "_" + std::to_string(i);
        parameters += ", " + name;
        items += name + ", ";
    }
    const std::string text = "lambda " + parameters + ": _tuple_new(_cls, (" + items + "))";
    const Ref outer = checked(Py_CompileString(text.c_str(), "<namedtuple>", Py_eval_input));
    const Ref constants = attribute_of(outer.get(), "co_consts");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(constants.get()); ++i) {
        PyObject* constant = PyTuple_GET_ITEM(constants.get(), i);
        if (PyCode_Check(constant)) return Ref::borrow(constant);
    }
    throw std::logic_error("a lambda without code");
}

// Whether two functions behave the same for the same arguments, given equal globals.
bool same_code(PyObject* code, PyObject* other) {
    for (const char* name : {"co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags",
                             "co_names", "co_freevars", "co_cellvars", "co_consts", "co_code"}) {
        const Ref mine = attribute_of(code, name);
        const Ref its = attribute_of(other, name);
        if (!equal(mine.get(), its.get())) return false;
    }
    return true;
}

// The `__new__` of the class, or of the first base that defines it, as stored there. Null if it is
// not a staticmethod.
Ref static_method_of(PyTypeObject* type) {
    const Ref mro = Ref::borrow(type->tp_mro);  // a look-up may run Python code that replaces it
    const Ref name = checked(PyUnicode_InternFromString("__new__"));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mro.get()); ++i) {
        auto* base = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(mro.get(), i));
        if (!PyType_HasFeature(base, Py_TPFLAGS_HEAPTYPE)) return nullptr;
        Ref found = item_of(base->tp_dict, name.get());
        if (found) return callable_of_static(found.get()) != nullptr ? std::move(found) : Ref();
    }
    return nullptr;
}

// How a namedtuple class creates instances of `count` items. It creates them directly if `__new__`
// is the generated `lambda _cls, x, y: _tuple_new(_cls, (x, y))` and `_tuple_new` is tuple.__new__.
std::unique_ptr<Making> examine(PyTypeObject* type, std::size_t count) {
    auto made = std::make_unique<Making>();
    if (!trials.code.held() || !trials.tuple_items.held() || !trials.type_slots.held()) return made;
    made->version = compat::type_version(type);
    made->count = count;
    if (!calls_only_new(type) || !is_laid_out_as_tuple(type)) return made;
    made->tp_new = type->tp_new;
    // The look-up assigns a version to the type if it has none.
    const Ref constructor = attribute(reinterpret_cast<PyObject*>(type), "__new__");
    if (made->version == 0) made->version = compat::type_version(type);
    if (!constructor || !PyFunction_Check(constructor.get())) return made;
    const Ref method = static_method_of(type);
    if (!method || callable_of_static(method.get()) != constructor.get()) return made;
    made->method = method.get();
    made->code = Ref::borrow(code_of(constructor.get()));
    made->tuple_new = global_of(globals_of(constructor.get()), "_tuple_new");
    const Ref expected = attribute(reinterpret_cast<PyObject*>(&PyTuple_Type), "__new__");
    made->direct = parameters_of(made->code.get()) == count + 1 && made->tuple_new && expected &&
                   equal(expected.get(), made->tuple_new.get()) &&
                   same_code(made->code.get(), generated_code(count).get());
    return made;
}

// Whether the first item of a dict, read without Python code, is this object under this key.
bool is_first_item(PyObject* dict, PyObject* name, PyObject* expected) noexcept {
    if (!trials.dict_table.held()) return false;
    const CriticalSection reading(dict);
    const TextEntries entries(dict);
    return OPTREE_LIKELY(entries && PyDict_GET_SIZE(dict) != 0 && entries.first_key() == name &&
                         entries.value(0) == expected);
}

// Whether the dict holds this object under an interned str. May run Python code.
bool is_item(PyObject* dict, PyObject* name, PyObject* expected) {
    try {
        return item_of(dict, name).get() == expected;
    } catch (const PythonError&) {
        PyErr_Clear();
        return false;
    }
}

}  // namespace

Ref namedtuple_fields(PyTypeObject* type) {
    // A program may have replaced the attribute since the class was recognised.
    Ref fields = attribute_of(reinterpret_cast<PyObject*>(type), "_fields");
    bool are_names = PyTuple_Check(fields.get());
    for (Py_ssize_t i = 0; are_names && i < PyTuple_GET_SIZE(fields.get()); ++i) {
        are_names = PyUnicode_Check(PyTuple_GET_ITEM(fields.get(), i));
    }
    if (!are_names) raise(PyExc_TypeError, "Expected a collections.namedtuple type, got %R.", type);
    return fields;
}

Ref structseq_fields(PyTypeObject* type) {
    PyObject* object = reinterpret_cast<PyObject*>(type);
    const auto count_of = [object](const char* name) {
        const Ref count = attribute_of(object, name);
        const Py_ssize_t value = PyLong_AsSsize_t(count.get());
        if (value == -1 && PyErr_Occurred()) throw PythonError{};
        return value;
    };
    const Py_ssize_t visible = count_of("n_sequence_fields");
    ObjectStack fields;
    // A member has the offset of its slot. Unnamed slots have no member.
    const PyMemberDef* member = type->tp_members;
    for (Py_ssize_t i = 0; i < visible; ++i) {
        const Py_ssize_t offset = offset_of_tuple_item(i);
        const char* name = "unnamed field";
        for (const PyMemberDef* m = member; m != nullptr && m->name != nullptr; ++m) {
            if (m->offset == offset) name = m->name;
        }
        fields.push_owned(checked(PyUnicode_InternFromString(name)).release());
    }
    return fields.into_tuple();
}

TupleSort TupleClasses::learn(PyTypeObject* type) {
    // The code below may run Python code, which may drop the class or query it again.
    const Ref alive = Ref::borrow(reinterpret_cast<PyObject*>(type));
    const TupleSort sort = sort_by_attributes(type);
    if (evict_ == nullptr) return sort;
    const auto is_known = [&] {
        const ReaderSection section;
        return classes_.peek().of_type.find(type) != nullptr;
    };
    Ref weakref;
    if (PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)) {
        if (is_known()) return sort;
        weakref = checked(PyWeakref_NewRef(alive.get(), evict_));
    }
    auto made = std::make_unique<TupleClass>(sort, weakref.get());
    const WriterLock writing(lock_);
    if (is_known()) return sort;
    classes_.update([&](Classes& classes) {
        if (weakref) classes.of_weakref.insert(weakref.get(), type);
        try {
            classes.of_type.insert(type, made.get());
        } catch (...) {
            classes.of_weakref.erase(weakref.get());
            throw;
        }
    });
    (void)made.release();  // now owned by the table
    (void)weakref.release();
    return sort;
}

OPTREE_INLINE const Making* TupleClasses::making_of(PyTypeObject* type) noexcept {
    const auto bits = reinterpret_cast<std::uintptr_t>(type);
    Recent& recent = recent_[((bits >> 4) ^ (bits >> 7)) % recent_.size()];
    if (!compat::kFreeThreaded && OPTREE_LIKELY(recent.type == type)) return recent.making;
    const TupleClass* known = classes_.peek().of_type.find(type);
    if (known == nullptr) return nullptr;
    const Making* making = &known->making.peek();
    if (!compat::kFreeThreaded) recent = {type, making};
    return making;
}

bool TupleClasses::ask_directly(PyTypeObject* type, std::size_t count) {
    const unsigned int version = compat::type_version(type);
    PyObject* constructor = nullptr;
    // With the interpreter lock the function is read from the staticmethod, which a class keeps as
    // long as its version does not change. Without the lock another thread may remove it at any
    // time.
    Ref asked;
    if (compat::kFreeThreaded && calls_only_new(type)) {
        asked = attribute(reinterpret_cast<PyObject*>(type), str_new_.get());
    }
    PyObject* code = nullptr;
    PyObject* tuple_new = nullptr;
    newfunc tp_new = nullptr;
    {
        const ReaderSection section;
        const Making* making = making_of(type);
        if (OPTREE_LIKELY(making != nullptr && making->version == version && version != 0 &&
                          making->count == count)) {
            if (!making->direct) return false;
            constructor = compat::kFreeThreaded ? asked.get() : callable_of_static(making->method);
            code = making->code.get();
            tuple_new = making->tuple_new.get();
            tp_new = making->tp_new;
        }
    }
    if (OPTREE_UNLIKELY(constructor == nullptr)) return decide(type, count);
    if (!calls_only_new(type) || type->tp_new != tp_new || !PyFunction_Check(constructor) ||
        code_of(constructor) != code) {
        return false;
    }
    PyObject* globals = globals_of(constructor);
    if (!is_first_item(globals, str_tuple_new_.get(), tuple_new)) {
        const Stretch loud(*this, false);
        pause_->end();
        return is_item(globals, str_tuple_new_.get(), tuple_new);
    }
    if (kKeepsAnswer && is_quiet_) answered_ = {type, count};
    return true;
}

bool TupleClasses::decide(PyTypeObject* type, std::size_t count) {
    const Stretch loud(*this, false);
    pause_->end();
    const Ref alive = Ref::borrow(reinterpret_cast<PyObject*>(type));
    (void)sort_of(type);
    std::unique_ptr<Making> making = examine(type, count);
    const bool direct = making->direct;
    if (making->version == 0) return direct;
    std::unique_ptr<Making> dropped;  // dropped after the lock is released
    const WriterLock writing(lock_);
    if (TupleClass* known = classes_.peek().of_type.find(type)) {
        dropped = known->making.publish(std::move(making));
        forget_recent();
    }
    return direct;
}

int TupleClasses::traverse(visitproc visit, void* arg) const {
    int status = 0;
    classes_.peek().of_type.for_each([&](PyTypeObject*, const TupleClass* entry) {
        if (status == 0 && entry->weakref != nullptr) status = visit(entry->weakref, arg);
    });
    return status;
}

void TupleClasses::evict(PyObject* weakref) {
    std::unique_ptr<TupleClass> evicted;
    Ref dropped;
    const WriterLock writing(lock_);
    PyTypeObject* type = classes_.peek().of_weakref.find(weakref);
    if (type == nullptr) return;
    TupleClass* entry = classes_.peek().of_type.find(type);
    classes_.update([&](Classes& classes) {
        classes.of_weakref.erase(weakref);
        classes.of_type.erase(type);
    });
    forget_recent();
    evicted.reset(entry);
    dropped = Ref::steal(weakref);
}

void TupleClasses::clear() noexcept {
    std::unique_ptr<Classes> dropped;
    {
        const WriterLock writing(lock_);
        dropped = classes_.take();
        forget_recent();
    }
    if (!dropped) return;
    dropped->of_type.for_each([](PyTypeObject*, TupleClass* entry) {
        const std::unique_ptr<TupleClass> owner(entry);
        Py_XDECREF(entry->weakref);
    });
}

}  // namespace optree
