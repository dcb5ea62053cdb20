// SPDX-License-Identifier: Apache-2.0
#include "support/sharing.h"

#include <thread>

#include "cpython/calling.h"

namespace optree {

#if defined(Py_GIL_DISABLED)
namespace {

// Each thread counts its entries and exits on its own cache line, as long as there are enough
// lines.
constexpr unsigned kLines = 128;
struct alignas(64) Line {
    std::atomic<std::uint32_t> readers{0};
};
Line lines[kLines];

std::atomic<std::uint32_t>& own_line() noexcept {
    static std::atomic<unsigned> next{0};
    thread_local const unsigned line = next.fetch_add(1, std::memory_order_relaxed) % kLines;
    return lines[line].readers;
}

}  // namespace

// Either the reader's increment comes first and the writer sees it, or the writer's exchange comes
// first and the reader sees the new value. Both operations are sequentially consistent.
ReaderSection::ReaderSection() noexcept { own_line().fetch_add(1); }
ReaderSection::~ReaderSection() { own_line().fetch_sub(1, std::memory_order_release); }

void wait_for_readers() noexcept {
    for (const Line& line : lines) {
        while (line.readers.load() != 0) std::this_thread::yield();
    }
}
#else

void Turn::wait() {
    calling_python([&] {
        Py_BEGIN_ALLOW_THREADS;
        PyThread_acquire_lock(lock_, WAIT_LOCK);
        Py_END_ALLOW_THREADS;
    });
}

#endif

}  // namespace optree
