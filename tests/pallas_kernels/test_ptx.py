"""What is seen in PTX, on lines as XLA writes them."""

from pallas_kernels.ptx import float_bytes

FLOATS = """
    add.rn.f32 %r217, %r185, 0f4B400000;
    add.rn.f32 %r218, %r186, 0f4B400000;
    st.shared.b8 [%rd31], %r217;
    st.shared.b8 [%rd33+512], %r218;
"""
INTEGERS = """
    add.rn.f32 %r217, %r185, 0f4B40005A;
    xor.b32 %r218, %r217, 90;
    st.shared.b8 [%rd31], %r218;
    @%p1 st.global.u8 [ %rd33 + 0 ], { %r219 };
    st.shared.b32 [%rd35], %r217;
"""


def test_bytes_of_floats_are_counted():
    assert float_bytes(FLOATS) == 2
    assert float_bytes(INTEGERS) == 0
    assert float_bytes(INTEGERS + "fma.rn.sat.f32 %r219, %r1, %r2, %r3;") == 1
    copied = "cvt.u16.u32 %rs1, %r217; st.global.v2.b8 [%rd1], {%rs0, %rs1};"
    assert float_bytes(INTEGERS + copied) == 1
