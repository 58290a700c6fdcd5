# Enables CUDA where an nvcc works, and says which architectures to build for.
#
# nvcc: the user's choice (CUDACXX, CMAKE_CUDA_COMPILER), else that of PATH, CUDA_PATH, CUDA_HOME or
# /usr/local/cuda, else that of the nvidia-cuda-nvcc wheel of the Python that builds us.
# Sets prolora_cuda, and prolora_architectures (separated by spaces).
set(prolora_cuda OFF)
set(prolora_architectures "")
if(PROLORA_CUDA STREQUAL "OFF")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(PROLORA_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(NOT PROLORA_NVCC)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import nvidia.cu13 as m; print(list(m.__path__)[0])"
      OUTPUT_VARIABLE wheel_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(EXISTS "${wheel_root}/bin/nvcc")
      set(PROLORA_NVCC "${wheel_root}/bin/nvcc")
      # The wheel keeps its libraries in lib/, but its nvcc asks the linker for lib64/.
      set(ENV{LIBRARY_PATH} "${wheel_root}/lib")
    endif()
  endif()
  if(PROLORA_NVCC)
    set(ENV{CUDACXX} "${PROLORA_NVCC}")
  endif()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  if(PROLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PROLORA_CUDA=ON, but no nvcc was found: install a CUDA toolkit or run "
                        "pip install 'cuda-toolkit[nvcc,cccl]==13.0.*'")
  endif()
  message(STATUS "prolora: built without CUDA kernels: no nvcc was found")
  return()
endif()

# check_language compiles a program, in a project of its own: there a broken nvcc does not end ours.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PROLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PROLORA_CUDA=ON, but $ENV{CUDACXX} cannot compile")
  endif()
  leave_out("CUDA kernels" "$ENV{CUDACXX} cannot compile")
  return()
endif()

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(chosen_architectures "${CMAKE_CUDA_ARCHITECTURES}")
enable_language(CUDA)
include(${CMAKE_CURRENT_LIST_DIR}/DefaultArchitectures.cmake)
default_architectures("${CMAKE_CUDA_COMPILER_VERSION}" default)
if(NOT default)
  if(PROLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PROLORA_CUDA=ON, but nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old")
  endif()
  leave_out("CUDA kernels" "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0")
  return()
endif()
if(chosen_architectures)
  set(CMAKE_CUDA_ARCHITECTURES "${chosen_architectures}")
else()
  set(CMAKE_CUDA_ARCHITECTURES "${default}")
endif()
set(prolora_architectures "${CMAKE_CUDA_ARCHITECTURES}")
if(prolora_architectures MATCHES "^(native|all|all-major)$")
  string(TOUPPER "${prolora_architectures}" word)
  string(REPLACE "-" "_" word "${word}")
  set(prolora_architectures "${CMAKE_CUDA_ARCHITECTURES_${word}}")
endif()
list(JOIN prolora_architectures " " prolora_architectures)
set(prolora_cuda ON)
message(STATUS "prolora: CUDA kernels for ${prolora_architectures}, by ${CMAKE_CUDA_COMPILER}")
