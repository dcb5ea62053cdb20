// SPDX-License-Identifier: Apache-2.0
// The tools with which threads share memory if there is no interpreter lock. With the lock, all of
// this compiles to nothing except for the pointer in `Published`.
//
//   CriticalSection   CPython's own lock of one object, while its items are copied
//   Published<T>      read without a lock inside a ReaderSection; replaced as a whole under a
//                     WriterLock, which waits until no thread reads the old value before it is freed;
//                     changed in place where the interpreter lock keeps readers out
//   Turn              one thread at a time, across calls of Python code (walk/iterate.cpp)
//
// No Python code runs in a ReaderSection or under a WriterLock.
#pragma once

#include <atomic>
#include <memory>
#include <new>
#include <utility>

#include "support/ref.h"

namespace optree {

#if defined(Py_GIL_DISABLED)

class CriticalSection {
  public:
    explicit CriticalSection(PyObject* object) noexcept {
        calling_python([&] { PyCriticalSection_Begin(&section_, object); });
    }
    CriticalSection(const CriticalSection&) = delete;
    CriticalSection& operator=(const CriticalSection&) = delete;
    ~CriticalSection() { PyCriticalSection_End(&section_); }

  private:
    PyCriticalSection section_;
};

// The section consists of a few loads. It does not block, allocate or call Python.
class ReaderSection {
  public:
    ReaderSection() noexcept;
    ReaderSection(const ReaderSection&) = delete;
    ReaderSection& operator=(const ReaderSection&) = delete;
    ~ReaderSection();
};

// Returns after every reader section that was open at the call has ended.
void wait_for_readers() noexcept;

// Keeps an object alive that another thread might drop.
class Held {
  public:
    void hold(Ref object) noexcept { object_ = std::move(object); }

  private:
    Ref object_;
};

class Lock {
  public:
    void lock() noexcept {
        calling_python([&] { PyMutex_Lock(&mutex_); });
    }
    void unlock() noexcept { PyMutex_Unlock(&mutex_); }

  private:
    PyMutex mutex_ = {};
};

#else

class CriticalSection {
  public:
    explicit CriticalSection(PyObject*) noexcept {}
};

class ReaderSection {
  public:
    ReaderSection() noexcept {}
};

inline void wait_for_readers() noexcept {}

// With the interpreter lock nothing is dropped before Python code runs.
class Held {
  public:
    void hold(const Ref&) noexcept {}
};

class Lock {
  public:
    void lock() noexcept {}
    void unlock() noexcept {}
};

#endif

class WriterLock {
  public:
    explicit WriterLock(Lock& lock) noexcept : lock_(lock) { lock_.lock(); }
    WriterLock(const WriterLock&) = delete;
    WriterLock& operator=(const WriterLock&) = delete;
    ~WriterLock() { lock_.unlock(); }

  private:
    Lock& lock_;
};

template <class T>
class Published {
  public:
    Published() : value_(new T) {}
    Published(const Published&) = delete;
    Published& operator=(const Published&) = delete;
    ~Published() { delete value_.load(std::memory_order_relaxed); }

    // The value, valid until the end of the caller's reader section or writer lock.
    const T& peek() const noexcept {
        return *value_.load(compat::kFreeThreaded ? std::memory_order_seq_cst
                                                  : std::memory_order_relaxed);
    }
    // Replaces the value by `next`. Returns the old value when no thread reads it any more. The
    // caller must hold the writer lock.
    std::unique_ptr<T> publish(std::unique_ptr<T> next) noexcept {
        std::unique_ptr<T> old(value_.exchange(next.release()));
        wait_for_readers();
        return old;
    }
    // Calls `change(value)`; the caller must hold the writer lock. If readers may be using the
    // value, a copy is changed and then published. Registering a class takes 0.3 us with the
    // interpreter lock. Without it, it takes 18 us if 8000 classes are registered; in return no
    // look-up takes a lock.
    template <class Change>
    void update(Change&& change) {
        if constexpr (compat::kFreeThreaded) {
            auto next = std::make_unique<T>(peek());
            change(*next);
            publish(std::move(next));
        } else {
            change(*value_.load(std::memory_order_relaxed));
        }
    }
    // Takes the value and leaves an empty one. Returns null and keeps the value if memory runs out.
    std::unique_ptr<T> take() noexcept {
        std::unique_ptr<T> empty(new (std::nothrow) T);
        return empty ? publish(std::move(empty)) : nullptr;
    }

  private:
    std::atomic<T*> value_;
};

// Admits one thread at a time. A thread that enters while another is inside waits and releases the
// interpreter lock meanwhile. `enter` returns false if the calling thread is already inside.
class Turn {
  public:
    Turn() = default;
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

#if defined(Py_GIL_DISABLED)
    bool is_free() const noexcept { return false; }  // only known after entering
    bool enter() noexcept {
        PyThreadState* self = PyThreadState_Get();
        // Only this thread can have stored itself there.
        if (owner_.load(std::memory_order_relaxed) == self) return false;
        calling_python([&] { PyMutex_Lock(&mutex_); });
        owner_.store(self, std::memory_order_relaxed);
        return true;
    }
    void leave() noexcept {
        owner_.store(nullptr, std::memory_order_relaxed);
        PyMutex_Unlock(&mutex_);
    }

  private:
    std::atomic<PyThreadState*> owner_{nullptr};
    PyMutex mutex_ = {};
#else
    ~Turn() {
        if (lock_ != nullptr) PyThread_free_lock(lock_);
    }
    // Whether no thread is inside. This stays true as long as no Python code runs.
    bool is_free() const noexcept { return owner_ == nullptr; }
    bool enter() {
        PyThreadState* self = PyThreadState_Get();
        if (owner_ == self) return false;
        if (lock_ == nullptr && (lock_ = PyThread_allocate_lock()) == nullptr) {
            throw std::bad_alloc();
        }
        if (OPTREE_UNLIKELY(PyThread_acquire_lock(lock_, NOWAIT_LOCK) == 0)) wait();
        owner_ = self;
        return true;
    }
    void leave() noexcept {
        owner_ = nullptr;
        PyThread_release_lock(lock_);
    }

  private:
    OPTREE_COLD void wait();  // releases the interpreter lock

    PyThreadState* owner_ = nullptr;
    PyThread_type_lock lock_ = nullptr;  // created by the first thread that enters
#endif
};

}  // namespace optree
