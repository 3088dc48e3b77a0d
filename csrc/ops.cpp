// Every op of the package: the table of contents. Semantics are in resnet_fast/ops/<op>.py.
#include "stable.h"

STABLE_TORCH_LIBRARY(resnet_fast, m) {
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, int[] "
      "stride, int[] padding, int[] dilation, int groups, str act) -> Tensor");
  m.def(
      "_conv_bn_act_cuda(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
      "int[] stride, int[] padding, int[] dilation, int groups, str act, str tile, int splits) -> "
      "Tensor");
  m.def("_release_memory() -> int");
  m.def("_direct_weight(Tensor weight, int groups) -> Tensor");
  m.def(
      "_direct_conv(Tensor x, Tensor packed, Tensor weight, Tensor? scale, Tensor? shift, Tensor? "
      "residual, int[] stride, int[] padding, int[] dilation, int groups, str act) -> Tensor");
  m.def("_winograd_weight(Tensor weight, int m) -> Tensor");
  m.def(
      "_winograd_conv(Tensor x, Tensor packed, Tensor weight, int m, Tensor? scale, Tensor? shift, "
      "Tensor? residual, int[] padding, str act) -> Tensor");
  m.def("_int8_weight(Tensor weight, int groups) -> Tensor");
  m.def(
      "_int8_conv(Tensor x, Tensor packed, Tensor weight, Tensor scale, Tensor shift, Tensor? "
      "residual, int[] stride, int[] padding, int[] dilation, int groups, str act, int zero, float "
      "residual_scale, float inverse, int out_zero) -> Tensor");
  m.def("_int8_quantize(Tensor x, float inverse, int zero) -> Tensor");
  m.def("_int8_mean(Tensor x, float scale, int zero) -> Tensor");
  m.def(
      "_int8_linear(Tensor x, Tensor packed, Tensor weight, Tensor scale, Tensor shift) -> Tensor");
  m.def("_int8_dequantize(Tensor x, float scale, int zero) -> Tensor");
  m.def("_make_sequence(Tensor[] constants, int[] steps, Tensor[] watched) -> int");
  m.def("_run_sequence(Tensor x, int sequence) -> Tensor");
  m.def("_sequence_bytes(Tensor x, int sequence) -> int");
  m.def("_free_sequence(int sequence) -> ()");
  m.def("bn_act(Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, str act) -> Tensor");
  m.def("add_act(Tensor x, Tensor residual, str act) -> Tensor");
  m.def("_add_act_backward(Tensor grad_y, Tensor x, Tensor residual, str act) -> Tensor");
  m.def(
      "residual_chain(Tensor x, Tensor residual, Tensor? weight2, Tensor? scale2, Tensor? shift2, "
      "Tensor? weight3, Tensor? scale3, Tensor? shift3, Tensor? weight_d, Tensor? scale_d, Tensor? "
      "shift_d, Tensor? weight_n, Tensor? scale_n, Tensor? shift_n, int stride, int stride_d, str "
      "act) -> (Tensor, Tensor)");
  m.def(
      "bn_act_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str act) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_bn_act_train_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? "
      "residual, Tensor mean, Tensor rstd, str act) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_act(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? "
      "residual, "
      "float eps, str act) -> Tensor");
  m.def(
      "conv_stats(Tensor x, Tensor weight, Tensor? mean, Tensor? rstd, Tensor? bn_weight, Tensor? "
      "bn_bias, float bn_eps, str act, int[] stride, int[] padding, int[] dilation, int groups, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_conv_stats_cuda(Tensor x, Tensor weight, Tensor? mean, Tensor? rstd, Tensor? bn_weight, "
      "Tensor? bn_bias, str act, int[] stride, int[] padding, int[] dilation, int groups, float "
      "eps, "
      "str tile) -> (Tensor, Tensor, Tensor)");
  m.def(
      "stem_pool(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? input_scale, "
      "Tensor? input_shift, str act) -> Tensor");
  m.def("_max_pool(Tensor x) -> Tensor");
  m.def("_max_pool_backward(Tensor grad_y, Tensor x) -> Tensor");
  m.def(
      "_stem_pool_cuda(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? input_scale, "
      "Tensor? input_shift, str act) -> Tensor");
}
