// SPDX-License-Identifier: Apache-2.0
#include "nodes/state.h"

#include <memory>
#include <new>

#include "cpython/trials.h"
#include "nodes/dispatch.h"
#include "support/errors.h"

namespace optree {
namespace {

void prepare_layouts(const State& state, LayoutCache& layouts) {
    layouts.empty = make_layout(state.layout(), nullptr, 0, true);
}

int state_traverse(PyObject* self, visitproc visit, void* arg) {
    State& state = as_state(self);
    OPTREE_VISIT_TYPE(self);
    for (const Ref* ref :
         {&state.layout_type, &state.loose_layout_type, &state.registration_type, &state.spec_type,
          &state.iter_type, &state.internal_error, &state.kind_enum, &state.stock,
          &state.evict_tuple_class, &state.copyreg_newobj, &state.one_level.output_class,
          &state.one_level.metadata_class, &state.one_level.handlers[0],
          &state.one_level.handlers[1]}) {
        Py_VISIT(ref->get());
    }
    Py_VISIT(state.accessors.load(std::memory_order_relaxed));
    for (const Ref& kind : state.kinds) Py_VISIT(kind.get());
    for (const Ref& cls : state.classes) Py_VISIT(cls.get());
    if (const int status = state.tuples.traverse(visit, arg)) return status;
    return state.registry.traverse(visit, arg);
}

int state_clear(PyObject* self) {
    // Clear the objects that can form cycles. Specs still need the types and names, which go with
    // the last reference.
    State& state = as_state(self);
    state.registry.clear();
    state.forget_layouts();
    state.tuples.close();
    Py_XDECREF(state.accessors.exchange(nullptr));
    state.one_level = {};
    state.stock = nullptr;
    state.evict_tuple_class = nullptr;
    return 0;
}

void state_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    state_clear(self);
    as_state(self).StateMembers::~StateMembers();
    type->tp_free(self);
    Py_DECREF(type);
}

PyType_Slot state_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(state_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(state_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(state_clear)},
    {0, nullptr},
};

PyType_Spec state_spec = {
    "optree._C.State",
    sizeof(State),
    0,
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | compat::kNoInstantiation),
    state_slots,
};

PyObject* evict_tuple_class(PyObject* self, PyObject* weakref) {
    return guarded(as_state(self).error(), [&] {
        as_state(self).tuples.evict(weakref);
        return compat::new_ref(Py_None);
    });
}

PyMethodDef evict_tuple_class_def = {"evict_tuple_class", evict_tuple_class, METH_O, nullptr};

void find_classes(State& state) {
    State::ExactClass* exact = state.exact;
    for_each_kind([&](auto node) {
        const Kind kind = kKindOf<decltype(node)>;
        Ref cls = decltype(node)::find_class();
        if (cls && !Context::asks_for(cls.get())) *exact++ = {cls.get(), kind};
        state.classes[static_cast<int>(kind)] = std::move(cls);
        return true;
    });
    *exact = {nullptr, kLeafKind};
}

Ref interned(const char* text) { return checked(PyUnicode_InternFromString(text)); }

}  // namespace

#if defined(Py_GIL_DISABLED)
namespace {

const char kLayoutsName[] = "optree._C.layouts";

// The state that this thread used last. The id of a state is never reused, and the capsule that
// owns the cache is destroyed with the Python state of the thread. So the pointer is valid if the
// id matches.
thread_local struct {
    std::uint64_t id = 0;
    std::uint64_t epoch = 0;
    LayoutCache* cache = nullptr;
} last_used;

void drop_layouts(PyObject* capsule) {
    auto* cache = static_cast<LayoutCache*>(PyCapsule_GetPointer(capsule, kLayoutsName));
    if (last_used.cache == cache) last_used = {};
    delete cache;
}

OPTREE_NOINLINE LayoutCache& find_layouts(State& state) {
    PyObject* dict = PyThreadState_GetDict();  // borrowed
    if (dict == nullptr) throw std::bad_alloc();
    const Ref key = formatted("%s.%llu", kLayoutsName, static_cast<unsigned long long>(state.id));
    Ref capsule = item_of(dict, key.get());
    if (!capsule) {
        auto made = std::make_unique<LayoutCache>();
        prepare_layouts(state, *made);
        capsule = checked(PyCapsule_New(made.get(), kLayoutsName, drop_layouts));
        (void)made.release();
        set_item(dict, key.get(), capsule.get());
    }
    auto* cache = static_cast<LayoutCache*>(PyCapsule_GetPointer(capsule.get(), kLayoutsName));
    if (cache == nullptr) throw PythonError{};
    const std::uint64_t epoch = state.layouts_epoch.load();
    if (cache->epoch != epoch) {
        cache->clear();
        cache->epoch = epoch;
    }
    last_used = {state.id, epoch, cache};
    return *cache;
}

}  // namespace

LayoutCache& layouts_of_thread(State& state) {
    if (OPTREE_LIKELY(last_used.id == state.id &&
                      last_used.epoch == state.layouts_epoch.load(std::memory_order_relaxed))) {
        return *last_used.cache;
    }
    return find_layouts(state);
}
#endif

Ref attribute_of_module(const char* module_name, const char* name) {
    const Ref module = checked(PyImport_ImportModule(module_name));
    return attribute_of(module.get(), name);
}

Ref State::accessor_class(const char* name) {
    PyObject* module = accessors.load();
    if (module == nullptr) {
        Ref imported =
            checked(calling_python([] { return PyImport_ImportModule("optree.accessors"); }));
        // Another thread may already have set it.
        if (accessors.compare_exchange_strong(module, imported.get())) module = imported.release();
    }
    return attribute_of(module, name);
}

State& state_of_type(PyTypeObject* type) {
    const Ref state = attribute_of(reinterpret_cast<PyObject*>(type), "_state");
    if (Py_TYPE(state.get())->tp_dealloc != state_dealloc) {
        raise(PyExc_TypeError, "expected the attribute _state of optree's own class, got %R",
              state.get());
    }
    return as_state(state.get());  // our class keeps it alive
}

void bind_type_to_state(PyTypeObject* type, State& state) {
    check_status(compat::set_class_attribute(type, "_state", reinterpret_cast<PyObject*>(&state)));
}

Ref make_state() {
    run_trials();
    const Ref type = internal_class(checked(PyType_FromSpec(&state_spec)));
    auto* state_type = reinterpret_cast<PyTypeObject*>(type.get());
    Ref self = checked(state_type->tp_alloc(state_type, 0));
    State& state = as_state(self.get());
    new (static_cast<StateMembers*>(&state)) StateMembers;
    static std::atomic<std::uint64_t> last_id{0};
    state.id = ++last_id;
    state.layout_type = make_layout_type(false);
    state.loose_layout_type = make_layout_type(true);
    state.registration_type = make_registration_type();
    find_classes(state);
    state.copyreg_newobj = attribute_of_module("copyreg", "__newobj__");
    state.empty_str = interned("");
    state.str_default_factory = interned("default_factory");
    state.str_maxlen = interned("maxlen");
    state.str_is_leaf = interned("is_leaf");
    state.str_none_is_leaf = interned("none_is_leaf");
    state.str_namespace = interned("namespace");
    state.evict_tuple_class = checked(PyCFunction_New(&evict_tuple_class_def, self.get()));
    state.tuples.init(state.evict_tuple_class.get(), state.collector_pause);
#if !defined(Py_GIL_DISABLED)
    prepare_layouts(state, state.own_layouts);
#endif
    return self;
}

}  // namespace optree
