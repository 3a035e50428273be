// The kernels that test programs run, of one instruction set, in one translation unit (FM_ISA is given on the command line).
#include "cpu/adamw_ema.cpp"
#include "cpu/divergence_step.cpp"
#include "cpu/linear_step.cpp"
#include "cpu/noise.cpp"
#include "cpu/path_loss.cpp"
#include "cpu/path_sample.cpp"
#include "cpu/probe.cpp"
#include "cpu/schedule.cpp"
