// resnet_fast._native.Guard: whether Python objects are still what they were.
//
// What a network's layers do depends on hundreds of attributes, children, hooks and parameters of
// its modules (resnet_fast/nn/sequence.py says which). Most of what they take to compare are misses
// of the caches, which a forward has emptied: of a ResNet-50's forward at one image 0.14 ms, with
// warm caches 0.04; one by one in Python it is 0.45.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>
#include <utility>
#include <vector>

namespace resnet_fast {

namespace py = pybind11;

class Guard {
 public:
  // The dict holds `value` under `key`, that very object.
  void same(const py::dict& where, const py::str& key, const py::object& value) {
    same_.push_back({where, key, value});
  }
  // The dict has no `key`.
  void absent(const py::dict& where, const py::str& key) { absent_.emplace_back(where, key); }
  // The dict is empty.
  void empty(const py::dict& where) { empty_.push_back(where); }
  // The dict has the items that it has now, in their order.
  void items(const py::dict& where) {
    Items now{where, {}};
    for (const auto& [key, value] : where) {
      now.items.emplace_back(py::reinterpret_borrow<py::object>(key),
                             py::reinterpret_borrow<py::object>(value));
    }
    items_.push_back(std::move(now));
  }
  // The object's class is the one that it is now.
  void type(const py::object& object) { types_.emplace_back(object, py::type::of(object)); }
  // The tensor's version and address are what they are now.
  void tensor(const py::object& tensor) {
    const py::object type = py::type::of(tensor);
    TensorState state{tensor, type.attr("_version"), type.attr("data_ptr"), 0, 0, {}};
    state.version = version_of(state);
    state.pointer = pointer_of(state);
    const py::object storage = tensor.attr("untyped_storage")();
    state.behind[0] = address(tensor.attr("_cdata"));
    state.behind[1] = address(storage.attr("_cdata"));
    tensors_.push_back(std::move(state));
  }

  bool holds() const {
    return all(
               same_, [](const Same& s) { return s.where.ptr(); },
               [](const Same& s) {
                 return PyDict_GetItemWithError(s.where.ptr(), s.key.ptr()) == s.value.ptr();
               }) &&
           all(
               types_, [](const auto& pair) { return pair.first.ptr(); },
               [](const auto& pair) {
                 return reinterpret_cast<PyObject*>(Py_TYPE(pair.first.ptr())) == pair.second.ptr();
               }) &&
           all(
               empty_, [](const py::dict& hooks) { return hooks.ptr(); },
               [](const py::dict& hooks) { return PyDict_Size(hooks.ptr()) == 0; }) &&
           all(
               absent_, [](const auto& pair) { return pair.first.ptr(); },
               [](const auto& pair) {
                 return PyDict_GetItemWithError(pair.first.ptr(), pair.second.ptr()) == nullptr;
               }) &&
           all(
               items_, [](const Items& i) { return i.where.ptr(); }, as_they_were) &&
           all(
               tensors_, [](const TensorState& t) { return t.tensor.ptr(); },
               [](const TensorState& t) {
                 return version_of(t) == t.version && pointer_of(t) == t.pointer;
               });
  }

  // A network holds its guard, and the guard the network's parts: the garbage collector has to see
  // through it. Types are left out, as they outlive their instances.
  int traverse(visitproc visit, void* arg) const {
    const auto each = [&](const py::object& o) { return visit_one(o.ptr(), visit, arg); };
    for (const Same& s : same_) {
      if (int stop = each(s.where); stop != 0) return stop;
      if (int stop = each(s.value); stop != 0) return stop;
    }
    for (const auto& [where, key] : absent_) {
      if (int stop = each(where); stop != 0) return stop;
    }
    for (const py::dict& hooks : empty_) {
      if (int stop = each(hooks); stop != 0) return stop;
    }
    for (const Items& i : items_) {
      if (int stop = each(i.where); stop != 0) return stop;
      for (const auto& [key, value] : i.items) {
        if (int stop = each(value); stop != 0) return stop;
      }
    }
    for (const auto& [object, type] : types_) {
      if (int stop = each(object); stop != 0) return stop;
    }
    for (const TensorState& t : tensors_) {
      if (int stop = each(t.tensor); stop != 0) return stop;
    }
    return 0;
  }

 private:
  static int visit_one(PyObject* object, visitproc visit, void* arg) {
    Py_VISIT(object);
    return 0;
  }
  struct Same {
    py::dict where;
    py::str key;
    py::object value;
  };
  struct Items {
    py::dict where;
    std::vector<std::pair<py::object, py::object>> items;
  };
  struct TensorState {
    py::object tensor;
    py::object get_version, get_pointer;  // what its class has under these names
    long long version;
    const void* pointer;
    const void* behind[2];  // where its attributes are read from
  };

  // Whether `holds` is true of each. The objects lie anywhere in memory: those that come next are
  // under way while one is looked at, and a dict's table as soon as the dict is there.
  template <typename T, typename Object, typename Holds>
  static bool all(const std::vector<T>& noted, const Object& object, const Holds& holds) {
    constexpr size_t kFar = 16, kNear = 8;
    for (size_t i = 0; i < noted.size(); ++i) {
      if (i + kFar < noted.size()) bring(object(noted[i + kFar]));
      if (i + kNear < noted.size()) {
        const T& next = noted[i + kNear];
        if constexpr (std::is_same_v<T, TensorState>) {
          for (const void* behind : next.behind) bring(behind);
        } else if (PyDict_Check(object(next))) {
          bring(reinterpret_cast<PyDictObject*>(object(next))->ma_keys);
        }
      }
      if (!holds(noted[i])) return failed();
    }
    // An error that a comparison left behind is the caller's to see.
    return PyErr_Occurred() == nullptr || failed();
  }

  static void bring(const void* object) {
    constexpr int kLine = 64, kLines = 2;
    for (int line = 0; line < kLines; ++line) {
      __builtin_prefetch(static_cast<const char*>(object) + line * kLine);
    }
  }

  static bool failed() {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return false;
  }

  static const void* address(const py::object& number) {
    const void* pointer = PyLong_AsVoidPtr(number.ptr());
    failed();
    return pointer;
  }

  // The attribute and the method without the search for them.
  static long long version_of(const TensorState& t) {
    PyObject *const self = t.tensor.ptr(), *const getter = t.get_version.ptr();
    const descrgetfunc get = Py_TYPE(getter)->tp_descr_get;  // null where a class holds a value
    const auto value = py::reinterpret_steal<py::object>(
        get == nullptr ? PyObject_GetAttrString(self, "_version")
                       : get(getter, self, reinterpret_cast<PyObject*>(Py_TYPE(self))));
    if (!value) throw py::error_already_set();
    return PyLong_AsLongLong(value.ptr());
  }

  static const void* pointer_of(const TensorState& t) {
    PyObject* const self = t.tensor.ptr();
    const auto value = py::reinterpret_steal<py::object>(
        PyObject_Vectorcall(t.get_pointer.ptr(), &self, 1, nullptr));
    if (!value) throw py::error_already_set();
    return address(value);
  }

  static bool equal(const py::object& a, const py::object& b) {
    const int result = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (result < 0) throw py::error_already_set();
    return result == 1;
  }

  static bool as_they_were(const Items& now) {
    if (PyDict_Size(now.where.ptr()) != static_cast<Py_ssize_t>(now.items.size())) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    for (const auto& [known_key, known_value] : now.items) {
      if (PyDict_Next(now.where.ptr(), &at, &key, &value) == 0 || value != known_value.ptr()) {
        return false;
      }
      if (key != known_key.ptr() && !equal(py::reinterpret_borrow<py::object>(key), known_key)) {
        return false;
      }
    }
    return true;
  }

  std::vector<Same> same_;
  std::vector<std::pair<py::dict, py::str>> absent_;
  std::vector<py::dict> empty_;
  std::vector<Items> items_;
  std::vector<std::pair<py::object, py::object>> types_;
  std::vector<TensorState> tensors_;
};

// Python's own hooks for the collector. An instance may be looked at before it is initialised.
inline Guard* initialised_guard(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? static_cast<Guard*>(holder.value_ptr()) : nullptr;
}

inline int traverse_guard(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Guard* guard = initialised_guard(self);
  return guard == nullptr ? 0 : guard->traverse(visit, arg);
}

inline int clear_guard(PyObject* self) {
  if (Guard* guard = initialised_guard(self)) {
    const Guard old = std::move(*guard);  // gone before what it held is
    *guard = Guard();
  }
  return 0;
}

inline void define_guard(py::module_& m) {
  const py::custom_type_setup collected([](PyHeapTypeObject* heap) {
    heap->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    heap->ht_type.tp_traverse = &traverse_guard;
    heap->ht_type.tp_clear = &clear_guard;
  });
  py::class_<Guard>(m, "Guard", "Whether Python objects are still what they were when noted.",
                    collected)
      .def(py::init<>())
      .def("same", &Guard::same, "Note the object that a dict holds under a key.")
      .def("absent", &Guard::absent, "Note that a dict has no such key.")
      .def("empty", &Guard::empty, "Note that a dict is empty.")
      .def("items", &Guard::items, "Note the items of a dict, in their order.")
      .def("type", &Guard::type, "Note the class of an object.")
      .def("tensor", &Guard::tensor, "Note the version and the address of a tensor.")
      .def("holds", &Guard::holds, "Whether all that was noted still is so.");
}

}  // namespace resnet_fast
