/* Ends a mounted ext4 as a loss of power does: power FOLDER. Nothing is written any more, not even
 * the journal's last transaction; reads and writes fail. See EXT4_IOC_SHUTDOWN in Linux,
 * fs/ext4/ext4.h. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>

#define SHUTDOWN _IOR('X', 125, uint32_t)
#define WITHOUT_THE_JOURNAL 2

int main(int argc, char **argv) {
    uint32_t how = WITHOUT_THE_JOURNAL;
    int folder = argc == 2 ? open(argv[1], O_RDONLY | O_DIRECTORY) : -1;
    if (folder < 0 || ioctl(folder, SHUTDOWN, &how) != 0) {
        perror("power");
        return 1;
    }
    return 0;
}
