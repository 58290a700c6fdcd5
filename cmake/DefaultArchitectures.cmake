# Sets `result` to the architectures that an nvcc of this version builds for; empty if it is too old.
#
# Machine code for Turing, Ampere and Ada, Hopper, Blackwell (the last two kinds from CUDA 12.8 on), and
# intermediate code for what lies between and comes after.
function(default_architectures version result)
  set(architectures "")
  if(version VERSION_GREATER_EQUAL 12.8)
    set(architectures 75-real 80 90-real 100-real 120)
  elseif(version VERSION_GREATER_EQUAL 12.0)
    set(architectures 75-real 80 90)
  endif()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()
