// SPDX-License-Identifier: Apache-2.0
// A small open-addressing map from pointers to pointers. A miss, the common case, takes one probe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace optree {

// Keys and values are borrowed: the owner of the map keeps them alive.
template <class Key, class Value>
class PointerMap {
  public:
    std::size_t size() const noexcept { return size_; }

    Value* find(const Key* key) const noexcept {
        if (size_ == 0) return nullptr;
        for (std::size_t i = hash(key) & mask();; i = (i + 1) & mask()) {
            if (entries_[i].key == key) return entries_[i].value;
            if (entries_[i].key == nullptr) return nullptr;
        }
    }

    void insert(Key* key, Value* value) {
        if (entries_.empty() || (size_ + 1) * 2 > entries_.size()) rehash();
        place(entries_, key, value);
        ++size_;
    }

    void erase(const Key* key) noexcept {
        if (size_ == 0) return;
        std::size_t gap = hash(key) & mask();
        while (entries_[gap].key != key) {
            if (entries_[gap].key == nullptr) return;
            gap = (gap + 1) & mask();
        }
        // Moves up the entries that were displaced past the gap.
        for (std::size_t i = (gap + 1) & mask(); entries_[i].key != nullptr; i = (i + 1) & mask()) {
            const std::size_t home = hash(entries_[i].key) & mask();
            if (((i - home) & mask()) < ((i - gap) & mask())) continue;
            entries_[gap] = entries_[i];
            gap = i;
        }
        entries_[gap] = {};
        --size_;
    }

    template <class Visit>
    void for_each(Visit&& visit) const {
        for (const Entry& entry : entries_) {
            if (entry.key != nullptr) visit(entry.key, entry.value);
        }
    }

  private:
    struct Entry {
        Key* key = nullptr;
        Value* value = nullptr;
    };
    static std::size_t hash(const void* key) noexcept {
        const auto bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(key));
        return static_cast<std::size_t>((bits * 0x9e3779b97f4a7c15ULL) >> 32);
    }
    std::size_t mask() const noexcept { return entries_.size() - 1; }
    static void place(std::vector<Entry>& entries, Key* key, Value* value) {
        const std::size_t mask = entries.size() - 1;
        std::size_t i = hash(key) & mask;
        while (entries[i].key != nullptr) i = (i + 1) & mask;
        entries[i] = {key, value};
    }
    void rehash() {
        std::vector<Entry> grown(entries_.empty() ? 16 : entries_.size() * 2);
        for (const Entry& entry : entries_) {
            if (entry.key != nullptr) place(grown, entry.key, entry.value);
        }
        entries_.swap(grown);
    }

    std::vector<Entry> entries_;
    std::size_t size_ = 0;
};

}  // namespace optree
