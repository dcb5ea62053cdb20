// SPDX-License-Identifier: Apache-2.0
// The objects stored for a node. A slot type implements every operation on its slots:
//
//   equal(a, b)           whether the slots of two nodes are equal; may run Python code
//   hash(seed, slot)      the seed mixed with what `equal` compares
//   may_nest(slot)        whether the objects in it may hold specs
//   data(slot, data, keys)
//                         the data shown to Python, given that of the slots after this one;
//                         `keys(layout)` makes a list of keys
//   write(slot, node)     the parts that a pickle stores besides `data`
//   read(node)            the slot read from a pickle; raises if the pickle is malformed
//   type(slot)            the class of the node; null if this slot does not determine it
//   entry(slot, i)        the entry that leads to child i; null if this slot does not determine it
//   entries(slot)         the entries of all children as a tuple; null likewise
//   require_same(a, b, kind)
//                         raises ValueError if the nodes cannot be merged
//
// Every slot is an object or null. Therefore visiting (for the collector), sharing and dropping are
// the same for all types.
#pragma once

#include <tuple>
#include <utility>

#include "nodes/layout.h"
#include "nodes/pickled.h"
#include "nodes/registry.h"
#include "spec/hash.h"

namespace optree {

inline int visit_slot(Slot slot, visitproc visit, void* arg) {
    Py_VISIT(as_object(slot));
    return 0;
}
// A new reference to a slot, as Builder::append expects.
inline Slot share_slot(Slot slot) noexcept {
    Py_XINCREF(as_object(slot));
    return slot;
}
inline void drop_slot(Slot slot) noexcept { xdrop(as_object(slot)); }

std::uint64_t hash_of_object(PyObject* object);
std::uint64_t hash_of_keys(KeyLayout* layout);
[[noreturn]] OPTREE_COLD void raise_other_class(const char* kind, Slot a, Slot b);
[[noreturn]] OPTREE_COLD void raise_other_metadata(Slot a, Slot b);

// The defaults that most slot types share.
struct AnySlot {
    static constexpr bool kInPrefix = true;  // prefixes must have equal slots of this type
    static bool equal(Slot, Slot) { return true; }
    static std::uint64_t hash(std::uint64_t seed, Slot) { return seed; }
    static bool may_nest(Slot) noexcept { return true; }
    template <class Keys>
    static Ref data(Slot, Ref data, Keys&&) {
        return data;
    }
    static void write(Slot, WrittenNode&) {}
    static PyObject* type(Slot) noexcept { return nullptr; }
    static Ref entry(Slot, std::uint32_t) { return nullptr; }
    static Ref entries(Slot) { return nullptr; }
    static void require_same(Slot, Slot, const char*) {}
};

struct Registered : AnySlot {
    static bool equal(Slot a, Slot b) { return a == b; }
    static std::uint64_t hash(std::uint64_t seed, Slot slot) {
        return combine(seed, hash_of_object(type(slot)));
    }
    static void write(Slot slot, WrittenNode& node) { node.type = Ref::borrow(type(slot)); }
    static Ref read(ReadNode& node);
    static PyObject* type(Slot slot) noexcept { return as_registration(slot)->type; }
};

struct Metadata : AnySlot {
    static bool equal(Slot a, Slot b) { return optree::equal(as_object(a), as_object(b)); }
    template <class Keys>
    static Ref data(Slot slot, const Ref&, Keys&&) {
        return Ref::borrow(as_object(slot));
    }
    static Ref read(ReadNode& node) { return Ref::borrow(node.data); }
    static void require_same(Slot a, Slot b, const char*) {
        if (!equal(a, b)) raise_other_metadata(a, b);
    }
};

struct Entries : AnySlot {
    static void write(Slot slot, WrittenNode& node) { node.entries = Ref::borrow(as_object(slot)); }
    static Ref read(ReadNode& node);
    static Ref entry(Slot slot, std::uint32_t index) {
        return slot != nullptr ? Ref::borrow(PyTuple_GET_ITEM(as_object(slot), index)) : Ref();
    }
    static Ref entries(Slot slot) { return Ref::borrow(as_object(slot)); }
};

struct OrderedKeys : AnySlot {
    static bool equal(Slot a, Slot b) { return same_keys(as_layout(a), as_layout(b)); }
    static std::uint64_t hash(std::uint64_t seed, Slot slot) {
        return combine(seed, hash_of_keys(as_layout(slot)));
    }
    static bool may_nest(Slot slot) noexcept { return !as_layout(slot)->atomic; }
    template <class MakeKeys>
    static Ref data(Slot slot, const Ref&, MakeKeys&&) {
        return layout_keys(as_layout(slot));
    }
    static Ref read(ReadNode& node) { return read_keys(node, false); }
    static Ref entry(Slot slot, std::uint32_t index) {
        return Ref::borrow(as_layout(slot)->keys[index]);
    }
    static Ref entries(Slot slot) { return layout_entries(as_layout(slot)); }
};

struct Keys : OrderedKeys {
    template <class MakeKeys>
    static Ref data(Slot slot, const Ref&, MakeKeys&& make_keys) {
        return make_keys(as_layout(slot));
    }
    static void write(Slot slot, WrittenNode& node) {
        node.original = written_original(as_layout(slot), node.data.get(), node.for_pickle);
    }
    static Ref read(ReadNode& node) { return read_keys(node, true); }
};

struct Class : AnySlot {
    static bool equal(Slot a, Slot b) { return optree::equal(as_object(a), as_object(b)); }
    static std::uint64_t hash(std::uint64_t seed, Slot slot) {
        return combine(seed, hash_of_object(as_object(slot)));
    }
    template <class Keys>
    static Ref data(Slot slot, const Ref&, Keys&&) {
        return Ref::borrow(as_object(slot));
    }
    static Ref read(ReadNode& node);
    static PyObject* type(Slot slot) noexcept { return as_object(slot); }
    static void require_same(Slot a, Slot b, const char* kind) {
        if (a != b) raise_other_class(kind, a, b);
    }
};

struct Factory : AnySlot {
    static bool equal(Slot a, Slot b) { return optree::equal(as_object(a), as_object(b)); }
    static std::uint64_t hash(std::uint64_t seed, Slot slot) {
        return combine(seed, hash_of_object(as_object(slot)));
    }
    template <class Keys>
    static Ref data(Slot slot, const Ref& keys, Keys&&) {
        return checked(PyTuple_Pack(2, as_object(slot), keys.get()));
    }
    static Ref read(ReadNode& node);  // does not read the keys
};

struct Maxlen : AnySlot {
    static constexpr bool kInPrefix = false;
    static bool equal(Slot a, Slot b) {
        if (a == nullptr || b == nullptr) return a == b;
        return optree::equal(as_object(a), as_object(b));
    }
    static std::uint64_t hash(std::uint64_t seed, Slot slot) {
        return combine(seed, slot != nullptr ? hash_of_object(as_object(slot)) : ~std::uint64_t{0});
    }
    template <class Keys>
    static Ref data(Slot slot, const Ref&, Keys&&) {
        return Ref::borrow(slot != nullptr ? as_object(slot) : Py_None);
    }
    static Ref read(ReadNode& node);
};

// The slots of a kind, as listed in kinds.def.
template <class... Types>
struct SlotList {
    static constexpr std::size_t kCount = sizeof...(Types);

    static bool equal(const Slot* a, const Slot* b) {
        return all([&]<class T>(std::size_t i) { return T::equal(a[i], b[i]); });
    }
    static bool equal_in_prefix(const Slot* a, const Slot* b) {
        return all([&]<class T>(std::size_t i) { return !T::kInPrefix || T::equal(a[i], b[i]); });
    }
    static std::uint64_t hash(std::uint64_t seed, const Slot* slots) {
        each([&]<class T>(std::size_t i) { seed = T::hash(seed, slots[i]); });
        return seed;
    }
    static bool may_nest(const Slot* slots) noexcept {
        return !all([&]<class T>(std::size_t i) { return !T::may_nest(slots[i]); });
    }
    // Null if there is nothing to show.
    template <class MakeKeys>
    static Ref data(const Slot* slots, MakeKeys&& make_keys) {
        Ref data;
        each_from_last(
            [&]<class T>(std::size_t i) { data = T::data(slots[i], std::move(data), make_keys); });
        return data;
    }
    static void write(const Slot* slots, WrittenNode& node) {
        each_from_last([&]<class T>(std::size_t i) {
            node.data = T::data(slots[i], std::move(node.data), layout_keys);
            T::write(slots[i], node);
        });
    }
    static void read(ReadNode& node, Ref* slots) {
        each([&]<class T>(std::size_t i) { slots[i] = T::read(node); });
    }
    // Null if the kind determines the class.
    static PyObject* type(const Slot* slots) noexcept {
        PyObject* type = nullptr;
        each([&]<class T>(std::size_t i) {
            if (PyObject* found = T::type(slots[i])) type = found;
        });
        return type;
    }
    // Null if the children are numbered.
    static Ref entry(const Slot* slots, std::uint32_t index) {
        Ref entry;
        each([&]<class T>(std::size_t i) {
            if (!entry) entry = T::entry(slots[i], index);
        });
        return entry;
    }
    static Ref entries(const Slot* slots) {
        Ref entries;
        each([&]<class T>(std::size_t i) {
            if (!entries) entries = T::entries(slots[i]);
        });
        return entries;
    }
    static void require_same(const Slot* a, const Slot* b, const char* kind) {
        each([&]<class T>(std::size_t i) { T::require_same(a[i], b[i], kind); });
    }

  private:
    // Calls f<T>(index) for each slot until it returns false.
    template <class F>
    static bool all(F&& f) {
        return [&]<std::size_t... I>(std::index_sequence<I...>) {
            return (f.template operator()<Types>(I) && ...);
        }(std::index_sequence_for<Types...>());
    }
    template <class F>
    static void each(F&& f) {
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            (f.template operator()<Types>(I), ...);
        }(std::index_sequence_for<Types...>());
    }
    template <class F, std::size_t kLeft = kCount>
    static void each_from_last(F&& f) {
        if constexpr (kLeft != 0) {
            f.template operator()<std::tuple_element_t<kLeft - 1, std::tuple<Types...>>>(kLeft - 1);
            each_from_last<F, kLeft - 1>(std::forward<F>(f));
        }
    }
};

}  // namespace optree
