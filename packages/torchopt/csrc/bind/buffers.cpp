// SPDX-License-Identifier: Apache-2.0
#include "bind/buffers.h"

#include <cstdint>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace torchopt::buffers {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kDefaultLimit = std::size_t{1} << 30;

/// The unused blocks of one size.
struct Bin {
    std::vector<void*> blocks;
    std::uint64_t last_used = 0;  // the time on the store's clock
};

struct Store {
    std::mutex mutex;  // protects everything below; no other function is called while it is held
    std::unordered_map<std::size_t, Bin> bins;
    std::size_t kept = 0;
    std::size_t used = 0;
    std::size_t limit = kDefaultLimit;
    std::uint64_t clock = 0;
};

/// Never destroyed: tensors may outlive every static object.
Store& store() {
    static Store* const instance = new Store;
    return *instance;
}

std::size_t rounded(std::size_t bytes) {
    return bytes == 0 ? kAlignment : (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void free_block(void* block) noexcept { ::operator delete(block, std::align_val_t{kAlignment}); }

/// Frees blocks until at most `limit` bytes are kept. Blocks whose size was requested least recently are freed first.
void shrink(Store& s, std::size_t limit) noexcept {
    while (s.kept > limit) {
        auto oldest = s.bins.end();
        for (auto bin = s.bins.begin(); bin != s.bins.end(); ++bin)
            if (!bin->second.blocks.empty() &&
                (oldest == s.bins.end() || bin->second.last_used < oldest->second.last_used))
                oldest = bin;
        if (oldest == s.bins.end()) return;
        while (s.kept > limit && !oldest->second.blocks.empty()) {
            free_block(oldest->second.blocks.back());
            oldest->second.blocks.pop_back();
            s.kept -= oldest->first;
        }
        if (oldest->second.blocks.empty()) s.bins.erase(oldest);
    }
}

}  // namespace

void* take(std::size_t bytes) {
    const std::size_t size = rounded(bytes);
    Store& s = store();
    {
        const std::lock_guard lock(s.mutex);
        const auto bin = s.bins.find(size);
        if (bin != s.bins.end()) {
            bin->second.last_used = ++s.clock;
            if (!bin->second.blocks.empty()) {
                void* const block = bin->second.blocks.back();
                bin->second.blocks.pop_back();
                s.kept -= size;
                s.used += size;
                return block;
            }
        }
    }
    void* const block = ::operator new(size, std::align_val_t{kAlignment});
    const std::lock_guard lock(s.mutex);
    s.used += size;
    return block;
}

void give_back(void* block, std::size_t bytes) noexcept {
    const std::size_t size = rounded(bytes);
    Store& s = store();
    const std::lock_guard lock(s.mutex);
    s.used -= size;
    if (size <= s.limit) {
        try {
            Bin& bin = s.bins[size];
            bin.blocks.push_back(block);
            bin.last_used = ++s.clock;
            s.kept += size;
            shrink(s, s.limit);
            return;
        } catch (const std::bad_alloc&) {
            // The block cannot be recorded for lack of memory, so it is freed.
        }
    }
    free_block(block);
}

void lock() { store().mutex.lock(); }

void unlock() noexcept { store().mutex.unlock(); }

void release() noexcept {
    Store& s = store();
    const std::lock_guard lock(s.mutex);
    shrink(s, 0);
}

std::size_t set_limit(std::size_t bytes) noexcept {
    Store& s = store();
    const std::lock_guard lock(s.mutex);
    const std::size_t previous = s.limit;
    s.limit = bytes;
    shrink(s, bytes);
    return previous;
}

Usage usage() noexcept {
    Store& s = store();
    const std::lock_guard lock(s.mutex);
    return {s.kept, s.used};
}

}  // namespace torchopt::buffers
