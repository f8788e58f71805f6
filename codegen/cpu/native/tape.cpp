// A sequence of kernel calls made in one go. Structures hold everything but addresses, which are those of the memory
// that this run was given plus an offset.
#include <stdint.h>
#include <string.h>

struct Step {
    void (*kernel)(const void *);
    int64_t place, size;      // of the structure among all
    int64_t first, addresses; // those of the structure's fields that are filled in
};

struct Address {
    int64_t field, base, offset;  // the field's place in the structure; which memory, and where in it
};

constexpr int64_t LARGEST_STRUCTURE = 1280;

extern "C" int64_t regraft_largest_structure() { return LARGEST_STRUCTURE; }

extern "C" void regraft_run(const Step *steps, int64_t count, const char *structures, const Address *addresses,
                            char *const *bases) {
    for (const Step *step = steps; step < steps + count; step++) {
        alignas(8) char structure[LARGEST_STRUCTURE];
        memcpy(structure, structures + step->place, step->size);
        for (const Address *a = addresses + step->first; a < addresses + step->first + step->addresses; a++) {
            char *address = bases[a->base] + a->offset;
            memcpy(structure + a->field, &address, sizeof address);
        }
        step->kernel(structure);
    }
}
