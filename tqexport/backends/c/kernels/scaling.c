/* sum * multiplier * 2^(exponent - 31), rounded twice, as TFLite Micro and CMSIS-NN do: the product to a whole number,
 * then the shift, halves away from zero. */
static int32_t scaled(int32_t sum, int32_t multiplier, int32_t exponent)
{
    int64_t product;
    int32_t high, mask;
    if (exponent > 0) { /* a sum that large leaves every grid, so it may as well be cut */
        sum = sum > 65535 ? 65535 : sum < -65535 ? -65535 : sum;
        sum *= (int32_t)1 << exponent;
        exponent = 0;
    }
    product = (int64_t)sum * multiplier;
    product += product >= 0 ? (int64_t)1 << 30 : 1 - ((int64_t)1 << 30);
    high = (int32_t)(product / ((int64_t)1 << 31));
    mask = (int32_t)(((uint32_t)1 << -exponent) - 1);
    return (high >> -exponent) + ((high & mask) > (mask >> 1) + (high < 0));
}

/* A whole number of steps from zero as a level of a grid. Steps may be so many that only what is left of them after the
 * comparisons can be added to anything. */
static int8_t to_level(int32_t steps, const grid *target)
{
    if (steps < target->low - target->zero) {
        return target->low;
    }
    return steps > target->high - target->zero ? target->high : (int8_t)(steps + target->zero);
}
