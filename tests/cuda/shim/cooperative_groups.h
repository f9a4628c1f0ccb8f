// Clusters of blocks, as cuda_runtime.h has them.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  using Location = std::source_location;
  void barrier_arrive(Location at = Location::current()) const { shim::cluster_arrive(at.line()); }
  void barrier_wait(Location at = Location::current()) const { shim::cluster_wait(at.line()); }
  void sync(Location at = Location::current()) const {
    shim::cluster_arrive(at.line());
    shim::cluster_wait(at.line());
  }
  template <class T>
  T* map_shared_rank(T* pointer, int rank, Location at = Location::current()) const {
    void* here = const_cast<std::remove_const_t<T>*>(pointer);
    return static_cast<T*>(shim::in_cluster(here, rank, at.line()));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
