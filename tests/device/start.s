/* Where the processor starts, in the place of newlib's own start, which asks the emulator for a stack and believes it. */
    .syntax unified
    .thumb
    .section .vectors, "a"
    .word __stack
    .word _start

    .text
    .global _start, _init, _fini
    .thumb_func
_start:
    bl initialise_monitor_handles /* standard output, by semihosting */
    bl main
    bl exit
    .thumb_func
_init:
_fini:
    bx lr
